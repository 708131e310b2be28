"""Rows: every source and every form of a row gives the same conversation and response."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gadcore.data.forms import RawRow
from gadcore.data.rows import load_rows

USER = {"role": "user", "content": "What is two plus two?"}
TEACHER = {"role": "assistant", "content": "Four."}
FORMS: dict[str, dict[str, Any]] = {
    "prompt and response": {"prompt": USER["content"], "teacher_response": "Four."},
    "prompt as messages": {"prompt": [USER], "teacher_response": "Four."},
    "content and response": {"content": [USER], "teacher_response": "Four."},
    "messages and response": {"messages": [USER], "teacher_response": "Four."},
    "messages alone": {"messages": [USER, TEACHER]},
    "prompt-completion": {"prompt": USER["content"], "completion": "Four."},
    "conversational prompt-completion": {"prompt": [USER], "completion": [TEACHER]},
    "other columns": {"id": 3, "prompt": USER["content"], "teacher_response": "Four.", "source": None},
    "nulls of a merged table": {"messages": None, "prompt": USER["content"], "completion": None,
                                "teacher_response": "Four."},
}  # fmt: skip


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row(form: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", FORMS[form])
    assert load_rows(path, {}) == [RawRow((USER,), "Four.", f"{path}:1")]


def test_earlier_turns_and_system_messages_stay(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, TEACHER, {"role": "user", "content": "Sure?"}]
    last = {"role": "assistant", "content": "Yes."}
    path = write_jsonl(tmp_path / "train.jsonl", {"messages": [*turns, last]}, {"content": turns, "completion": "Yes."})
    for row in load_rows(path, {}):
        assert (list(row.messages), row.teacher_response) == (turns, "Yes.")


def test_texts_are_kept_to_the_letter(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", {"prompt": "  a\n\u2028b ", "teacher_response": "\n é 🙂\r\n"})
    (row,) = load_rows(path, {})
    assert row.messages[0]["content"] == "  a\n\u2028b "
    assert row.teacher_response == "\n é 🙂\r\n"


def test_other_fields_of_a_message_are_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", {"messages": [USER | {"name": "x"}], "teacher_response": "Four."})
    assert load_rows(path, {})[0].messages == (USER,)


def test_the_column_map_names_the_sources_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", {"question": USER["content"], "answer": "Four."})
    rows = load_rows(path, {"prompt": "question", "teacher_response": "answer"})
    assert rows == [RawRow((USER,), "Four.", f"{path}:1")]


def test_a_mapped_column_comes_before_the_usual_names(tmp_path: Path) -> None:
    row = {
        "messages": [TEACHER],
        "prompt": "no",
        "question": USER["content"],
        "teacher_response": "no",
        "gold": "Four.",
    }
    path = write_jsonl(tmp_path / "train.jsonl", row)
    assert load_rows(path, {"prompt": "question", "completion": "gold"}) == [RawRow((USER,), "Four.", f"{path}:1")]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    line = json.dumps(FORMS["messages alone"])
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n   \n{line}".encode())
    assert [row.where for row in load_rows(str(path), {})] == [f"{path}:1", f"{path}:4"]


def test_compressed_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(FORMS["messages alone"]).encode()))
    assert load_rows(str(path), {}) == [RawRow((USER,), "Four.", f"{path}:1")]


@pytest.mark.parametrize("form", ["prompt and response", "content and response", "messages alone"])
def test_parquet(form: str, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([FORMS[form]] * 3), path)
    assert load_rows(str(path), {}) == [RawRow((USER,), "Four.", f"{path}[{i}]") for i in range(3)]


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"prompt": name, "teacher_response": "x"})
    pyarrow.parquet.write_table(
        pa.Table.from_pylist([{"prompt": "c", "teacher_response": "x"}]), tmp_path / "c.parquet"
    )
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden").write_text("x")
    assert [row.messages[0]["content"] for row in load_rows(str(tmp_path), {})] == ["a", "b", "c"]


def test_the_limit_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(FORMS["messages alone"]) + "\n") * 2 + "broken\n")
    assert len(load_rows(str(path), {}, 2)) == 2


def test_the_builtin_data_has_two_splits_without_a_common_prompt() -> None:
    train = load_rows("builtin", {})
    held_out = load_rows("builtin", {}, split="eval")
    assert train[0].where == "builtin/train.jsonl:1"
    assert held_out[0].where == "builtin/eval.jsonl:1"
    prompts = {row.messages[-1]["content"] for row in train}
    assert not prompts & {row.messages[-1]["content"] for row in held_out}


@pytest.mark.parametrize(
    ("source", "split", "asked"),
    [
        ("owner/name", "train", "train"),
        ("owner/name", "eval", "test"),
        ("owner/name:validation", "eval", "validation"),
        ("owner/name:train", "eval", "train"),
    ],
)
def test_a_hub_id_is_loaded_by_datasets(source: str, split: Any, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        assert (name, split) == ("owner/name", asked)
        return datasets.Dataset.from_list([{"content": [USER], "teacher_response": "Four."}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(source, {}, split=split) == [RawRow((USER,), "Four.", f"owner/name:{asked}[0]")]


def test_a_path_that_exists_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "rows.jsonl", FORMS["messages alone"])
    assert [row.where for row in load_rows("owner/name", {})] == ["owner/name/rows.jsonl:1"]


def test_reading_lines_imports_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from gadcore.data.rows import load_rows; load_rows('builtin', {}); "
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
