"""A run folder as the report reads it: its files are what they should be, or it says which one is not."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from gadcore.config.settings import GateSettings
from gadcore.errors import UserError
from gadcore.record import evaluations as evaluated
from gadcore.record.reading import Count, Figure, Finite, fitting, read_json
from gadcore.record.tracking import Row, scan

KNOWN_ORDER = ("before", "after_sft", "after_warmup", "after_seqkd", "after_soda", "after_gad")
Share = Annotated[Finite, Field(ge=0, le=1)]
Word = str | Finite | None


@dataclass(frozen=True)
class _Section:
    """Of config.toml."""

    name: str | None = None
    model: str | None = None
    train: str | None = None


@dataclass(frozen=True)
class _Config:
    run: _Section = _Section()
    student: _Section = _Section()
    discriminator: _Section = _Section()
    data: _Section = _Section()
    gate: GateSettings = GateSettings()


@dataclass(frozen=True)
class _Evaluation:
    """Of summary.json."""

    rows: Count = 0
    samples: Count = 1
    teacher: dict[str, Figure] | None = None
    words: Figure | None = None
    repeated: Figure | None = None
    distinct_2: Figure | None = None
    style: Figure | None = None
    word_range: Figure | None = None
    style_checks: dict[str, Figure] | None = None
    rouge_l: Figure | None = None
    ngram_f1: dict[str, Figure] | None = None
    length_ratio: Figure | None = None
    cut_share: Figure | None = None
    accuracy: Figure | None = None
    margin: Figure | None = None


@dataclass(frozen=True)
class _Models:
    student: str | None = None
    discriminator: str | None = None
    parameters: Count | None = None


@dataclass(frozen=True)
class _Machine:
    cpu: Word = None
    threads: Word = None
    device: Word = None
    torch: Word = None
    vllm: Word = None
    transformers: Word = None


@dataclass(frozen=True)
class _Data:
    train_rows: Count
    eval_rows: Count
    notes: list[str] | None = None


@dataclass(frozen=True)
class _Tokens:
    sampled: Count
    trained: Count


@dataclass(frozen=True)
class _Memory:
    states: dict[str, dict[str, Count]] = field(default_factory=dict)
    limit_bytes: Count | None = None
    process_bytes: Count | None = None


@dataclass(frozen=True)
class _Gate:
    measured: Annotated[list[tuple[Count, Share]], Field(min_length=1)]
    extra: Count = 0


@dataclass(frozen=True)
class _Convergence:
    measured: Annotated[list[tuple[Count, Share, Share, Share]], Field(min_length=1)]
    stopped: str = ""


@dataclass(frozen=True)
class _Look:
    stage: str
    step: Count
    value: Finite
    trained: Share | None = None


@dataclass(frozen=True)
class _Curriculum:
    looks: list[_Look]
    ends: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class _Summary:
    run: str | None = None
    started: str | None = None
    finished: str | None = None
    seconds: dict[str, Finite] | None = None
    steps: dict[str, Count] | None = None
    tokens: _Tokens | None = None
    models: _Models | None = None
    machine: _Machine | None = None
    data: _Data | None = None
    memory: _Memory | None = None
    evaluations: dict[str, _Evaluation] | None = None
    gate: _Gate | None = None
    convergence: _Convergence | None = None
    curriculum: _Curriculum | None = None


@dataclass(frozen=True)
class _Step:
    """Of metrics.jsonl; everything else in a row is a figure."""

    stage: str
    step: Count
    stage_step: Count
    stage_steps: Count


@dataclass(frozen=True)
class _Sample:
    """Of samples.jsonl."""

    stage: str
    step: Count
    prompt: str
    teacher: str
    student: str
    reward: Figure | None = None
    teacher_score: Figure | None = None


_CONFIG, _SUMMARY = TypeAdapter(_Config), TypeAdapter(_Summary)
_STEP, _SAMPLE, _FIGURE = TypeAdapter(_Step), TypeAdapter(_Sample), TypeAdapter(Figure)


@dataclass(frozen=True)
class RunFiles:
    """The files of a run folder as read. evaluations: rows by name, in the order in which they were made."""

    folder: Path
    config_text: str
    config: Row
    metrics: list[Row]
    samples: list[Row]
    evaluations: dict[str, list[Row]]
    summary: Row | None
    torn: list[str]

    @property
    def name(self) -> str:
        summary = self.summary or {}
        return str(summary.get("run") or self.config.get("run", {}).get("name") or self.folder.resolve().name)


def load(run_dir: Path) -> RunFiles:
    """Reads a run folder; only config.toml has to be there. Raises UserError for a file that is damaged."""
    folder = Path(run_dir)
    config_text, config = _config(folder)
    path, advice = folder / "summary.json", "restore it, or delete it (the report then does without it)"
    summary = read_json(path, advice) if path.is_file() else None
    if summary is not None:
        fitting(_SUMMARY, summary, path, advice)
    torn: list[str] = []
    paths = evaluated.paths(folder)
    order = [*((summary or {}).get("evaluations") or ()), *KNOWN_ORDER, *paths]
    names = [name for name in dict.fromkeys(order) if name in paths]
    read = {name: evaluated.read(paths[name]) for name in names}
    torn += [str(paths[name]) for name in names if read[name].torn]
    evaluations = {name: read[name].rows for name in names}
    for name in names:
        for line, row in enumerate(evaluations[name], 1):
            if (row.get("teacher_score") is None) != (row.get("student_score") is None):
                raise _damaged(paths[name], line, "it has one of teacher_score and student_score")
    for name in names[1:]:
        if line := unlike(evaluations[names[0]], evaluations[name]):
            raise UserError(
                f"{paths[name]}, line {line} has another prompt than {paths[names[0]].name}: the evaluations "
                "of a run must hold the same rows in the same order, so delete the one that does not belong here"
            )
    metrics = _rows(folder / "metrics.jsonl", _STEP, torn)
    for line, row in enumerate(metrics, 1):
        for key, value in row.items():
            if key != "stage":
                fitting(_FIGURE, value, f"{folder / 'metrics.jsonl'}, line {line}, {key!r}", "mend or delete that line")
    for line, (row, after) in enumerate(zip(metrics, metrics[1:], strict=False), 2):
        if after["step"] <= row["step"]:
            raise _damaged(folder / "metrics.jsonl", line, f"step {after['step']} follows step {row['step']}")
    samples = _rows(folder / "samples.jsonl", _SAMPLE, torn)
    return RunFiles(
        folder,
        config_text,
        config,
        metrics,
        samples,
        evaluations,
        summary,
        [str(Path(t).relative_to(folder)) for t in torn],
    )


def unlike(one: Sequence[Row], other: Sequence[Row]) -> int:
    """The first line at which two evaluations have different prompts, 0 where there is none as far as both go."""
    pairs = enumerate(zip_longest(one, other), 1)
    return next((line for line, (a, b) in pairs if a and b and a["prompt"] != b["prompt"]), 0)


def _config(folder: Path) -> tuple[str, Row]:
    path = folder / "config.toml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder (it has no config.toml): give the folder of a run")
    advice = "restore the file that the run wrote"
    try:
        text = path.read_text(encoding="utf-8")
        config: dict[str, Any] = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML ({error}): {advice}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from None
    fitting(_CONFIG, config, path, advice)
    return text, config


def _rows(path: Path, kind: TypeAdapter[Any], torn: list[str]) -> list[Row]:
    if not path.is_file():
        return []
    found = scan(path)
    if found.torn:
        torn.append(str(path))
    for line, row in enumerate(found.rows, 1):
        fitting(kind, row, f"{path}, line {line}", "mend or delete that line")
    return found.rows


def _damaged(path: Path, line: int, why: str) -> UserError:
    return UserError(f"{path}, line {line} is damaged ({why}): mend or delete that line")
