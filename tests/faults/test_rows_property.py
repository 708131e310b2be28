"""Any rows in any kind of file: the right rows, or one sentence that names the file. Nothing else.

GADCORE_EXAMPLES sets how many files are tried of each kind.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadcore.config.data import DataSettings
from gadcore.data.encoded import Rows
from gadcore.data.forms import NAMES, RawRow
from gadcore.data.rows import load_rows
from gadcore.data.sources import Source
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from tests.support.tiny import tiny_tokenizer

EXAMPLES = int(os.environ.get("GADCORE_EXAMPLES", "40"))
tried = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12)
GOOD = TEXT.filter(lambda text: text.strip())
# Half of a surrogate pair too, which JSON can write.
ANY_TEXT = st.one_of(TEXT, st.text(max_size=6), st.sampled_from(["<|im_end|>", "[", "none", "a+b", "\0", "\x1b[2J"]))
VALUE: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ANY_TEXT, inner, max_size=3)),
    max_leaves=6,
)
KEY = st.one_of(st.sampled_from([*NAMES, "custom_id", "body", "response", "role", "from"]), TEXT)
TURN = st.one_of(
    st.fixed_dictionaries({
        "role": st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "developer", "x"]),
        "content": st.one_of(ANY_TEXT, VALUE),
    }),
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "function"]), "value": ANY_TEXT}),
    VALUE,
)  # fmt: skip
ROW: Any = st.one_of(
    st.dictionaries(KEY, st.one_of(VALUE, st.lists(TURN, max_size=4)), max_size=5),
    st.fixed_dictionaries({"prompt": ANY_TEXT, "teacher_response": ANY_TEXT}),
    VALUE,
)
COLUMNS: Any = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["prompt", "a", "a+b", "none", ""]), max_size=2)


def right_or_told(path: Path, columns: dict[str, str] | None = None) -> list[RawRow] | None:
    """The rows, each of them whole; None where one UserError names the file."""
    try:
        rows = load_rows(str(path), columns or {})
    except UserError as error:
        assert str(path) in str(error) or "data.columns" in str(error)
        assert len(str(error).splitlines()) <= 20
        return None
    for row in rows:
        assert row.messages[-1]["role"] == "user" and row.messages[-1]["content"].strip()
        assert row.teacher_response.strip() and row.where.startswith(str(path))
        for message in row.messages:
            assert message["role"] in ("system", "user", "assistant")
            message["content"].encode()
    return rows


@tried
@given(rows=st.lists(ROW, max_size=4), columns=COLUMNS)
def test_json_of_any_content(rows: list[Any], columns: dict[str, str], tmp_path: Path) -> None:
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    array.write_text(json.dumps(rows))
    # A first line that is a list makes an array of the file; everything else is the same either way.
    one, other = right_or_told(lines, columns), right_or_told(array, columns)
    if not (rows and isinstance(rows[0], list)):
        assert (one is None) == (other is None)
        assert one is None or other is None or [r.messages for r in one] == [r.messages for r in other]


@tried
@given(content=st.one_of(st.binary(max_size=60), TEXT.map(str.encode)), ending=st.sampled_from(
    [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"]))  # fmt: skip
def test_bytes_of_any_kind(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    assert right_or_told(path) is None or ending not in (".parquet", ".jsonl.gz", ".csv.gz")


@tried
@given(pieces=st.lists(st.sampled_from(
    ['{"prompt": "a", "teacher_response": "b"}', "[", "]", ",", "\n", "{", "}", '"prompt"', ":", '"', "\\u0000",
     "1e999",
     "NaN", '"\\ud800"', '"prompt": "a"', '"completion": [{"role": "assistant", "content": "b"}]', " ", "\ufeff"]
), max_size=10))  # fmt: skip
def test_json_of_any_syntax(pieces: list[str], tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(pieces), encoding="utf-8")
        right_or_told(path)


@tried
@given(
    rows=st.lists(st.tuples(GOOD, GOOD), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t"),
    extra=st.lists(st.tuples(TEXT, TEXT), max_size=1),
)
def test_csv_gives_back_what_was_written(
    rows: list[tuple[str, str]], delimiter: str, extra: list[tuple[str, str]], tmp_path: Path
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["prompt", "teacher_response", *(name for name, _ in extra)])
    writer.writerows([*row, *(value for _, value in extra)] for row in rows)
    path = tmp_path / "rows.csv"
    path.write_bytes(text.getvalue().encode())
    found = right_or_told(path)
    if not extra:
        assert found is not None
    if found is not None and not extra:
        assert [(row.messages[-1]["content"], row.teacher_response) for row in found] == rows


CELLS: dict[str, Any] = {
    "text": (TEXT, pa.string()), "large": (TEXT, pa.large_string()), "bytes": (st.binary(max_size=4), pa.binary()),
    "number": (st.integers(0, 9), pa.int64()), "time": (st.integers(-(2**62), 2**62), pa.timestamp("us")),
    "date": (st.integers(-(2**31), 2**31 - 1), pa.date32()), "null": (st.none(), pa.null()),
    "list": (st.lists(TEXT, max_size=2), pa.list_(pa.string())),
    "turns": (st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": TEXT}),
                       max_size=3),
              pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))),
    "map": (st.dictionaries(TEXT, TEXT, max_size=2).map(lambda table: list(table.items())),
            pa.map_(pa.string(), pa.string())),
    "dictionary": (st.sampled_from(["x", "y"]), pa.dictionary(pa.int32(), pa.string())),
}  # fmt: skip


@tried
@given(data=st.data(), names=st.lists(KEY, max_size=5), count=st.integers(0, 3), columns=COLUMNS)
def test_parquet_of_any_columns(
    data: st.DataObject, names: list[str], count: int, columns: dict[str, str], tmp_path: Path
) -> None:
    arrays = []
    for _ in names:
        cells, kind = CELLS[data.draw(st.sampled_from(sorted(CELLS)))]
        values = data.draw(st.lists(st.one_of(st.none(), cells), min_size=count, max_size=count))
        arrays.append(pa.array(values, kind))
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, names=names), path)
    found = right_or_told(path, columns)
    assert found is None or len(found) == count


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer())


@tried
@given(
    rows=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=6),
    limits=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    policies=st.tuples(
        st.sampled_from(["truncate", "drop", "error"]), st.sampled_from(["cut", "drop", "error"]),
        st.sampled_from(["error", "skip"]),
    ),
)  # fmt: skip
def test_groups_are_within_their_limits_and_all_rows_are_accounted_for(
    rows: list[tuple[str, str]], limits: tuple[int, int], policies: tuple[Any, Any, Any],
    template: ChatTemplate, tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "teacher_response": r}) for p, r in rows))
    names = ("max_prompt_tokens", "max_response_tokens", "long_prompt", "long_response", "bad_rows")
    data = DataSettings.model_validate(dict(zip(names, (*limits, *policies), strict=True)))
    try:
        groups, report, _ = Rows(Source.find(str(path), "train"), data, None).groups(template, tmp_path, print)
    except UserError as error:
        assert str(path) in str(error) or "no usable rows are left" in str(error)
        return
    lost = report.dropped_prompts + report.dropped_responses
    skipped = int(report.skipped.split(" ")[0]) if report.skipped else 0
    assert len(groups) + lost + skipped == len(rows)
    for group in groups:
        assert 0 < len(group.prompt.token_ids) <= limits[0] and 0 < len(group.teacher.token_ids) <= limits[1]
        assert group.prompt.messages[-1]["content"].strip()
        assert group.teacher.finished == (group.teacher.token_ids[-1] == template.end_id)
