"""Bad data: one sentence each, with file, line, key or value, and nothing skipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gadcore.data.rows import load_rows
from gadcore.errors import UserError

GOOD: dict[str, Any] = {"prompt": "What is two plus two?", "teacher_response": "Four."}
USER = {"role": "user", "content": "Hello"}
TEACHER = {"role": "assistant", "content": "Hi."}


def error_of(source: Path | str, columns: dict[str, str] | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(source), columns or {}, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def third_line(tmp_path: Path, line: str | bytes) -> Path:
    """A file whose first row is good and whose third line is the given one."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    return path


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a"}, "no response: expected one of the columns teacher_response, completion, or another name for "
                          "one of them in the column map; the row has prompt"),
        ({"prompt": "a", "answer": "b"}, "the row has prompt, answer"),
        ({"teacher_response": "b", "id": 1}, "no prompt: expected one of the columns messages, content, prompt, or "
                                             "another name for one of them in the column map; the row has "
                                             "teacher_response, id"),
        ({}, "the row has no columns"),
        (GOOD | {"teacher_response": ""}, "the response (teacher_response) is empty: remove the row or fill it in"),
        (GOOD | {"teacher_response": " \n\t\u3000"}, "the response (teacher_response) is empty"),
        (GOOD | {"teacher_response": None}, "the response (teacher_response) must be text, found null"),
        (GOOD | {"teacher_response": 4}, "the response (teacher_response) must be text, found a number"),
        (GOOD | {"teacher_response": "\ud83d"}, "the response (teacher_response) holds half of a surrogate pair "
                                                "(character 0)"),
        (GOOD | {"prompt": "  "}, "the last user turn is empty"),
        (GOOD | {"prompt": 5}, "prompt must be a list of messages, found a number"),
        (GOOD | {"prompt": "\udc00"}, "the last user turn holds half of a surrogate pair"),
        ({"prompt": "a", "completion": [USER]}, "completion must be one assistant turn, found 1 turns"),
        ({"prompt": "a", "completion": [TEACHER, TEACHER]}, "completion must be one assistant turn, found 2 turns"),
        ({"messages": []}, "messages is an empty conversation"),
        ({"messages": "Hello"}, "messages must be a list of messages, found text"),
        ({"messages": ["Hello"]}, "message 1 of messages needs role and content, found text"),
        ({"messages": [USER, {"of": "gpt", "value": "Hi."}]}, "message 2 of messages needs role and content, found "
                                                                "the keys of, value"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "message 2 of messages is a tool's turn (tool)"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "the content of message 2 of messages must be "
                                                                       "text, found null"),
        ({"messages": [USER, TEACHER, USER]}, "no response: the last turn of messages must be the assistant's, found "
                                              "'user', and there is no column teacher_response or completion"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the response (messages) is empty"),
        ({"messages": [TEACHER]}, "the turn before the teacher's response must be the user's, found nothing"),
        ({"messages": [USER, TEACHER, TEACHER]}, "must be the user's, found 'assistant'"),
        ({"content": [USER, TEACHER], "teacher_response": "x"}, "must be the user's, found 'assistant'"),
        ({"content": [{"role": "user", "content": ""}], "teacher_response": "x"}, "the last user turn is empty"),
        ([1, 2], "expected an object with columns, found a list"),
        ("text", "expected an object with columns, found text"),
        (None, "expected an object with columns, found null"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used(row: Any, text: str, tmp_path: Path) -> None:
    path = third_line(tmp_path, json.dumps(row))
    message = error_of(path)
    assert message.startswith(f"{path}:3: ")
    assert text in message


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "a" "b"}', "broken JSON: Expecting ',' delimiter (column 16)"),
        ('{"prompt": "a', "broken JSON: Unterminated string starting at (column 12)"),
        ("[" * 100_000, "broken JSON: nested too deeply"),
        (b'{"prompt": "caf\xe9", "teacher_response": "x"}', "not UTF-8 (byte 15 of the line): save the file as UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read(line: str | bytes, text: str, tmp_path: Path) -> None:
    path = third_line(tmp_path, line)
    assert error_of(path) == f"{path}:3: {text}"


def test_a_mapped_column_that_is_not_there(tmp_path: Path) -> None:
    path = third_line(tmp_path, "")
    assert error_of(path, {"prompt": "question"}) == (
        f"{path}:1: there is no column 'question', which data.columns maps onto prompt; "
        "the row has prompt, teacher_response"
    )


def test_a_column_map_onto_an_unknown_name(tmp_path: Path) -> None:
    message = error_of(third_line(tmp_path, ""), {"promt": "question"})
    assert message.startswith("data.columns has no use for 'promt' (did you mean 'prompt'?)")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows(content: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    assert error_of(path) == f"{path} has no rows: give a source with at least one prompt and response"


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "absent.parquet", "data/absent.jsonl"])
def test_a_file_that_is_not_there(name: str) -> None:
    assert error_of(name) == f"the data file {name} does not exist"


@pytest.mark.parametrize("name", ["absent", "./a/b/c", "hose"])
def test_a_source_of_no_kind(name: str) -> None:
    assert error_of(name) == (
        f"there is no file or directory {name}: data is 'builtin', a .jsonl, .json, .csv, .tsv, .parquet file, "
        "a directory of these or a hub id owner/name"
    )


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "train.xlsx"
    path.write_text("prompt,teacher_response\n")
    assert error_of(path) == f"{path}: this kind of file cannot be read: use .jsonl, .json, .csv, .tsv, .parquet"


def test_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    assert error_of(tmp_path) == f"the directory {tmp_path} has no .jsonl, .json, .csv, .tsv, .parquet file"


@pytest.mark.parametrize("name", ["part.xlsx", "more", "README-rows.txt", "LICENSED.jsonlines"])
def test_a_directory_with_something_else_in_it(name: str, tmp_path: Path) -> None:
    third_line(tmp_path, "")
    (tmp_path / name).mkdir() if name == "more" else (tmp_path / name).write_text("x")
    assert error_of(tmp_path) == (
        f"{tmp_path / name} is not data that can be read (.jsonl, .json, .csv, .tsv, .parquet): "
        f"move it out of the directory {tmp_path}"
    )


def test_a_directory_in_the_place_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "x.jsonl"
    path.mkdir(parents=True)
    assert "is not data that can be read" in error_of(tmp_path / "rows")


def test_broken_compression_says_how_far_it_got(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(GOOD).encode() + b"\n" for _ in range(3)))
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(whole[:-8])
    assert error_of(path).startswith(f"{path} is a broken gzip file (after line 3): ")
    path.write_text("plain")
    assert error_of(path).startswith(f"{path} is a broken gzip file: Not a gzipped file")


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    assert error_of(path).startswith(f"{path} cannot be read as parquet: ")


def test_a_bad_row_of_a_parquet_file_is_named_by_its_index(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([GOOD, GOOD, GOOD | {"teacher_response": ""}]), path)
    assert error_of(path).startswith(f"{path}[2]: the response (teacher_response) is empty")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"),
        ValueError("Unknown split \"test\". Should be one of ['train']."),
    ],
)
def test_a_hub_set_that_cannot_be_loaded(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert error_of("owner/name", split="eval") == (
        "owner/name is no file or directory here, and its split 'test' could not be loaded from the hub: " + str(error)
    )
