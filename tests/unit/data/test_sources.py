"""Sources: files of every kind give the same rows, and what a row does not use need not be readable."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from gadcore.data.forms import RawRow
from gadcore.data.rows import load_rows
from gadcore.errors import UserError

ROWS = [
    {"prompt": 'Say "a, b";\nthen stop.', "teacher_response": "a, b"},
    {"prompt": "  é\t🙂 ", "teacher_response": "Four.\r\n"},
]
WHOLE = [(row["prompt"], row["teacher_response"]) for row in ROWS]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read(path: Path, content: bytes, columns: dict[str, str] | None = None) -> list[RawRow]:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return load_rows(str(path), columns or {})


def texts(rows: list[RawRow]) -> list[tuple[str, str]]:
    return [(row.messages[-1]["content"], row.teacher_response) for row in rows]


def error_of(path: Path, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(path), columns or {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode() + b"\n\n"),
        ("rows.json.gz", json.dumps(ROWS).encode()),
        ("rows.jsonl", json.dumps(ROWS).encode()),
        ("rows.json", "\n".join(map(json.dumps, ROWS)).encode()),
        ("rows.ndjson", "\n".join(map(json.dumps, ROWS)).encode()),
        ("rows.csv", as_csv(ROWS)),
        ("rows.csv", b"\xef\xbb\xbf" + as_csv(ROWS, ";")),
        ("rows.csv.gz", as_csv(ROWS, "\t")),
        ("rows.tsv", as_csv(ROWS, "\t")),
    ],
)
def test_every_kind_of_file(name: str, content: bytes, tmp_path: Path) -> None:
    assert texts(read(tmp_path / name, content)) == WHOLE


def test_csv_holds_messages_as_json_and_long_texts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x" * 200_000}, {"role": "assistant", "content": "y"}]
    rows = [{"id": "1", "messages": json.dumps(turns), "prompt": "", "system": ""}]
    assert texts(read(tmp_path / "rows.csv", as_csv(rows))) == [("x" * 200_000, "y")]


def test_a_row_of_csv_is_named_by_the_line_that_it_begins_in(tmp_path: Path) -> None:
    content = b'prompt,teacher_response\n"a\nb",x\n\nc,\nd,e,f\n'
    message = error_of_content(tmp_path / "rows.csv", content)
    assert "rows.csv:5: the response (teacher_response) is empty" in message
    assert "rows.csv:6: 3 fields, the header has 2: quote texts that hold ','" in message


def error_of_content(path: Path, content: bytes, columns: dict[str, str] | None = None) -> str:
    path.write_bytes(content)
    return error_of(path, columns)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", b'[{"prompt": "a"', "a.json[0]: broken JSON: Expecting ',' delimiter (line 1 column 16)"),
        ("a.json", b"[1,\n", "a.json[1]: broken JSON: Expecting value (line 2 column 1)"),
        ("a.json", b"[{} {}]", "a.json[1]: broken JSON: Expecting ',' delimiter"),
        ("a.json", b"[{},]", "a.json[1]: broken JSON"),
        ("a.json", b"[] {}", "broken JSON: Extra data after the list"),
        ("a.json", b"[" * 100_000, "a.json[0]: broken JSON: nested too deeply"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.json", b'["\xff"]', "a.json: not UTF-8 (byte 2)"),
        ("a.json", b"[3]", "a.json[0]: expected an object with columns, found a number"),
        ("a.jsonl", "{}".encode("utf-16"), "a.jsonl is not UTF-8 but UTF-16: save the file as UTF-8"),
        (
            "a.json",
            b'{\n "prompt": "a",\n "teacher_response": "b"\n}\n',
            "a.json is neither a list of rows nor a row a",
        ),
        ("a.csv", b'prompt,teacher_response\na,"b\n', "a.csv:2: broken CSV"),
        ("a.csv", b"prompt,teacher_response\na,\xff\n", "a.csv:2: not UTF-8 (byte 2 of the line): save the file as"),
        ("a.csv", b"fr\xe4ge,antwort\r\na,b\r\n", "a.csv:1: not UTF-8 (byte 2 of the line): save the file as UTF-8"),
        ("a.csv", b"p,t\ra,b\rc,d\xe4\r", "a.csv:3: not UTF-8 (byte 3 of the line)"),
        (
            "a.csv",
            b"prompt,completion\n" + b'"a\nb",c\n' * 5000 + b"d,\xe4\n",
            "a.csv:10002: not UTF-8 (byte 2 of the line)",
        ),
        ("a.csv", "prompt,teacher_response\na,b\n".encode("utf-16"), "a.csv is not UTF-8 but UTF-16"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"prompt,teacher_response\n", "a.csv has no rows"),
    ],
)
def test_a_broken_file(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    assert text in error_of_content(tmp_path / name, content)


HUGE = "1" * 5000


@pytest.mark.parametrize("unused", [f'"id": {HUGE}', f'"id": [-{HUGE}]'])
def test_an_unused_number_may_be_of_any_size(unused: str, tmp_path: Path) -> None:
    line = f'{{"prompt": "a", {unused}, "teacher_response": "b"}}'
    assert texts(read(tmp_path / "a.jsonl", line.encode())) == [("a", "b")]
    assert texts(read(tmp_path / "a.json", f"[{line}]".encode())) == [("a", "b")]


def test_a_used_number_of_any_size_is_a_number(tmp_path: Path) -> None:
    line = f'{{"prompt": "a", "teacher_response": -{HUGE}}}'
    assert "must be text, found a number" in error_of_content(tmp_path / "a.jsonl", line.encode())


@pytest.mark.parametrize("kind", ["timestamp beyond 9999", "integer as time", "decimal", "nested"])
def test_unused_columns_of_parquet_need_not_be_readable(kind: str, tmp_path: Path) -> None:
    column = {
        "timestamp beyond 9999": pa.array([2**62], pa.timestamp("us")),
        "integer as time": pa.array([2**60], pa.date64()),
        "decimal": pa.array([None], pa.decimal128(38, 3)),
        "nested": pa.array([[{"a": 1}]]),
    }[kind]
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": ["a"], "created": column, "prompt.x": [5], "teacher_response": ["b"]})
    pyarrow.parquet.write_table(table, path)
    assert texts(load_rows(str(path), {})) == [("a", "b")]
    used = error_of(path, {"prompt": "created"})
    assert str(path) in used and "\n" not in used


def test_a_column_twice_is_told_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    names = ["prompt", "teacher_response", "prompt", "id", "id"]
    table = pa.Table.from_arrays([pa.array([text]) for text in "abcde"], names=names)
    pyarrow.parquet.write_table(table, path)
    assert error_of(path) == f"{path}[0]: the column 'prompt' is there twice: keep one of them, or rename it"
    pyarrow.parquet.write_table(table.remove_column(2), path)
    assert texts(load_rows(str(path), {})) == [("a", "b")]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "a", "teacher_response": "b", "prompt": "c"}', "the column 'prompt' is there twice"),
        ('{"prompt": "a", "teacher_response": "b", "teacher_response": "b"}', "the column 'teacher_response' is there"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}], "completion": "x"}',
         "message 1 of messages has the key 'content' twice"),
    ],
)  # fmt: skip
def test_a_key_twice_is_told(line: str, text: str, tmp_path: Path) -> None:
    assert text in error_of_content(tmp_path / "a.jsonl", line.encode())


def test_an_unused_key_may_be_there_twice(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "teacher_response": "b", "id": 1, "id": 2, "x": {"y": 1, "y": 2}}'
    assert texts(read(tmp_path / "a.jsonl", line)) == [("a", "b")]


def test_a_csv_column_twice_is_told(tmp_path: Path) -> None:
    assert "the column 'prompt' is there twice" in error_of_content(
        tmp_path / "a.csv", b"prompt,prompt,teacher_response\na,b,c\n"
    )


def test_only_a_readme_and_a_licence_are_no_data(tmp_path: Path) -> None:
    for name in ("README-rows.jsonl", "LICENSED.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / name).write_text("about")
    assert len(load_rows(str(tmp_path), {})) == 3


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000 + ".jsonl"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(name, {})
    assert "\n" not in str(caught.value)


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0])
    lines = [good, '{"prompt": "x"}', good, "{", '{"prompt": "x"}', "[]", "{}", good]
    path.write_text("\n".join(lines))
    message = error_of(path)
    assert message.splitlines()[0] == (f"5 of 8 rows of {path} cannot be used: mend them or take them out")
    assert f"  {path}:2, {path}:5: no response" in message
    for number in (4, 6, 7):
        assert f"{path}:{number}: " in message


def test_a_list_of_bad_rows_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0])] + ["{}" for _ in range(3000)] + ["{" + "x" * i for i in range(40)]))
    message = error_of(path)
    assert message.startswith("3040 of 3041 rows of ") and len(message.splitlines()) < 20 and len(message) < 10_000
    assert "and 2995 more: no prompt" in message


def test_where_nothing_is_good_the_end_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x"}\n' * 5000)
    assert error_of(path).startswith(f"1000 of the first 1000 rows of {path} cannot be used")


def test_a_parquet_type_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise pa.ArrowNotImplementedError("Integers with less than 8 bits not implemented")

    path = tmp_path / "rows.parquet"
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    assert error_of(path) == (
        f"{path} has a column of a type that cannot be read (Integers with less than 8 bits not implemented): "
        "write the file again without it"
    )
