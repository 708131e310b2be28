"""Rows of evaluations/<name>.jsonl, as a run wrote them of every held-out prompt: what a reader may count on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from gadcore.record.reading import Figure, Finite, fitting
from gadcore.record.tracking import Scan, scan

FOLDER = "evaluations"


@dataclass(frozen=True)
class _Drawn:
    """One of a prompt's samples."""

    text: str
    finished: bool
    score: Figure | None = None


@dataclass(frozen=True)
class _Answer:
    """Older runs hold fewer of the figures, and no samples."""

    prompt: str
    teacher: str
    student: str
    rouge_l: Annotated[Finite, Field(ge=0, le=1)]
    length_ratio: Annotated[Finite, Field(ge=0)]
    teacher_score: Figure | None = None
    student_score: Figure | None = None
    teacher_finished: bool | None = None
    samples: Annotated[list[_Drawn], Field(min_length=1)] | None = None
    ngram_f1: dict[str, Figure] | None = None
    cut_share: Figure | None = None
    repeated: Figure | None = None
    distinct_2: Figure | None = None
    style: Figure | None = None
    word_range: Figure | None = None
    style_checks: dict[str, Figure] | None = None
    words: Figure | None = None
    accuracy: Figure | None = None
    margin: Figure | None = None


_ANSWER = TypeAdapter(_Answer)


def paths(run: Path) -> dict[str, Path]:
    """The evaluations of a run's folder by name, in the order in which they were written."""
    found = sorted((run / FOLDER).glob("*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return {path.stem: path for path in found}


def read(path: Path) -> Scan:
    """The rows of one evaluation. Raises UserError for the first that is damaged, by its line and field."""
    found = scan(path)
    for line, row in enumerate(found.rows, 1):
        fitting(_ANSWER, row, f"{path}, line {line}", "mend or delete that line")
    return found
