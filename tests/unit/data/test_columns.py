"""Advice on columns: obeyed to the letter it gives a right run, and where nothing tells the columns it says so."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gadcore.config.loading import load
from gadcore.data.rows import load_rows
from gadcore.data.sources import Source
from gadcore.errors import UserError

QUESTIONS = [f"What comes after the number {i}, and why is that so?" for i in range(12)]
ANSWERS = [f"After {i} comes {i + 1}, since each whole number has one that follows it. " * 3 for i in range(12)]
DATES = [f"2024-08-{i + 10}" for i in range(12)]


def table(**columns: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def of(names: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return table(**names)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def told(source: str, columns: Mapping[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(source, columns or {})
    return str(caught.value)


def advised(message: str) -> list[str]:
    """The settings that a message advises, as a shell would hand them on."""
    (command,) = re.findall(r"--data\.columns ('[^']*'|\"[^\"]*\"|[^ \n;]+)", message)
    return ["--data.columns", *shlex.split(command)]


CASES: dict[str, dict[str, Sequence[Any]]] = {
    "names": {"ID": range(12), "User Question": QUESTIONS, "GPT-4 Answer": ANSWERS, "Date": DATES},
    "answers before questions": {"assistant": ANSWERS, "user": QUESTIONS, "n": range(12)},
    "names against lengths": {"query": ANSWERS, "reply": QUESTIONS},
    "two answers": {"question": QUESTIONS, "Human Answer": ANSWERS, "GPT Answer": ANSWERS, "answer_id": DATES},
    "output alone": {"query": QUESTIONS, "output": ANSWERS},
    "texts alone": {"a": DATES, "b": ANSWERS, "c": range(12), "d": QUESTIONS, "e": ["x", "y z"] * 6},
    "one by name": {"questionText": QUESTIONS, "id": DATES, "spalte": ANSWERS},
    "users are names": {"user": ["Ann Lee", "Bob Ray"] * 6, "Titel": QUESTIONS, "Inhalt": ANSWERS},
    "a summary": {"article_id": DATES, "summary": ANSWERS, "article": QUESTIONS},
    "dollar": {"the $question": QUESTIONS, "an answer": ANSWERS},
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("case", CASES)
def test_advice_that_is_obeyed_gives_the_rows(case: str, ending: str, tmp_path: Path) -> None:
    columns = CASES[case]
    source = write(tmp_path / f"mine.{ending}", of(columns))
    message = told(source)
    first, *lines = message.splitlines()
    assert first.startswith(f"12 of 12 rows of {source} cannot be used: name the columns by --data.columns ")
    assert len(lines) == 1 and f"the row has {', '.join(columns)}" in lines[0] and "--data" not in lines[0]
    rows = load_rows(source, load(advised(message)).data.columns)
    swapped = case == "names against lengths"
    assert [row.messages[-1]["content"] for row in rows] == list(ANSWERS if swapped else QUESTIONS)
    assert [row.teacher_response for row in rows] == list(QUESTIONS if swapped else ANSWERS)


@pytest.mark.parametrize(
    ("columns", "mapped", "advice"),
    [
        ({"prompt": QUESTIONS, "response": ANSWERS}, {}, "--data.columns teacher_response=response"),
        ({"frage": QUESTIONS, "teacher_response": ANSWERS}, {}, "--data.columns prompt=frage"),
        ({"q": QUESTIONS, "answer": ANSWERS, "system": DATES}, {"prompt": "q"},
         "--data.columns prompt=q,teacher_response=answer"),
        ({"q": QUESTIONS, "answer": ANSWERS}, {"prompt": "question", "teacher_response": "answer"},
         "--data.columns teacher_response=answer,prompt=q"),
        ({"question": QUESTIONS, "answer": range(12), "n": DATES}, {},
         '--data.columns "prompt=question,teacher_response=COLUMN", where COLUMN is one of question, answer, n'),
        ({"question": QUESTIONS, "answers": ["3", "4"] * 6, "context": ANSWERS}, {},
         '"prompt=question,teacher_response=COLUMN", where COLUMN is one of question, answers, context'),
        ({"a": DATES, "b": range(12)}, {},
         '--data.columns "prompt=COLUMN,teacher_response=COLUMN", where COLUMN is one of a, b'),
        ({"date": DATES, "text": ANSWERS}, {},
         '--data.columns "prompt=COLUMN,teacher_response=COLUMN", where COLUMN is one of date, text'),
        ({"question, long": QUESTIONS, "answer": ANSWERS}, {},
         'columns = {"prompt" = "question, long", "teacher_response" = "answer"} in the table [data] of a file'),
    ],
)  # fmt: skip
def test_what_is_named_and_what_is_left_open(
    columns: dict[str, Sequence[Any]], mapped: dict[str, str], advice: str, tmp_path: Path
) -> None:
    first = told(write(tmp_path / "mine.csv", of(columns)), mapped).splitlines()[0]
    assert advice in first


@pytest.mark.parametrize(
    "values",
    [
        ["2024-08-19T10:00:00Z", "2024-08-20 11:12"],
        ["Aug 19, 2024", "3 September 2023", "19.8.2024"],
        ["https://example.org/a b"[:21], "http://b.de/q?x=1"],
        ["550e8400-e29b-41d4-a716-446655440000"],
        ["1,200.50", "-3", "50 %", "$4"],
        ["True", "false"],
    ],
)
def test_dates_numbers_and_identifiers_are_no_texts(values: list[str], tmp_path: Path) -> None:
    columns = {"x": (values * 12)[:12], "y": [question[:5] for question in QUESTIONS], "z": QUESTIONS}
    first = told(write(tmp_path / "mine.csv", of(columns))).splitlines()[0]
    assert "--data.columns prompt=y,teacher_response=z" in first or "COLUMN" in first
    assert "=x" not in first


def test_no_advice_would_help_a_file_with_good_rows_or_without_columns(tmp_path: Path) -> None:
    good = {"prompt": "a", "teacher_response": "b"}
    mixed = told(write(tmp_path / "mixed.jsonl", [good, *of(CASES["names"])]))
    assert mixed.startswith("12 of 13 rows") and "--data.columns" not in mixed
    assert "--data.columns" not in told(write(tmp_path / "few.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))


def test_one_row_has_its_advice_in_its_sentence(tmp_path: Path) -> None:
    source = write(tmp_path / "one.jsonl", [{"question": "Why is it so?", "answer": "Because."}])
    message = told(source)
    assert message.startswith(f"{source}:1: no prompt") and "\n" not in message
    assert message.endswith("; name the columns by --data.columns prompt=question,teacher_response=answer")


def test_of_a_table_of_the_hub_only_texts_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"more": {"deep": 1}} for row in of(CASES["texts alone"])]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: datasets.Dataset.from_list(rows))
    assert "--data.columns prompt=d,teacher_response=b" in told("owner/name")


def test_the_source_is_looked_at_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "mine.csv", of(CASES["names"]))
    asked, read = [], Source.records
    monkeypatch.setattr(Source, "records", lambda self, wanted=None: asked.append(wanted) or read(self, wanted))
    told(source)
    assert len(asked) == 2 and asked[1] is None
