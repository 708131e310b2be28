"""A run folder as the report reads it."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from gadcore.errors import UserError
from gadcore.record.tracking import Row, scan

KNOWN_ORDER = ("before", "after_sft", "after_warmup", "after_seqkd", "after_gad")


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


def load(run_dir: Path) -> RunFiles:
    """Reads a run folder; only config.toml has to be there."""
    folder = Path(run_dir)
    config_path = folder / "config.toml"
    if not config_path.is_file():
        raise UserError(f"{folder} is no run folder (it has no config.toml): give the folder of a run")
    config_text = config_path.read_text(encoding="utf-8")
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{config_path} is not valid TOML ({error}): restore the file that the run wrote") from error
    summary_path = folder / "summary.json"
    try:
        summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else None
    except ValueError as error:
        raise UserError(f"{summary_path} is not valid JSON ({error}): delete it or run again") from error
    torn: list[str] = []

    def rows(path: Path, *needed: str) -> list[Row]:
        if not path.is_file():
            return []
        found = scan(path)
        if found.torn:
            torn.append(str(path.relative_to(folder)))
        for line, row in enumerate(found.rows, 1):
            for key in needed:
                if key not in row:
                    raise UserError(f'{path}, line {line} has no "{key}": mend or delete that line')
        return found.rows

    paths = {path.stem: path for path in (folder / "evaluations").glob("*.jsonl")}
    evaluated = list((summary or {}).get("evaluations") or ())
    order = [*evaluated, *KNOWN_ORDER, *sorted(paths, key=lambda name: paths[name].stat().st_mtime)]
    names = [name for name in dict.fromkeys(order) if name in paths]
    answers = ("prompt", "teacher", "student")
    evaluations = {name: rows(paths[name], *answers, "rouge_l", "length_ratio") for name in names}
    for name in names[1:]:
        for line, (one, other) in enumerate(zip(evaluations[names[0]], evaluations[name], strict=False), 1):
            if one["prompt"] != other["prompt"]:
                raise UserError(
                    f"{paths[name]}, line {line} has another prompt than {paths[names[0]].name}: the evaluations "
                    "of a run must hold the same rows in the same order, so delete the one that does not belong here"
                )
    metrics = rows(folder / "metrics.jsonl", "stage", "step", "stage_step", "stage_steps")
    samples = rows(folder / "samples.jsonl", "stage", "step", *answers)
    return RunFiles(folder, config_text, config, metrics, samples, evaluations, summary, torn)
