"""The student of a run, for a person who wants to use it."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

from gadcore.config.settings import CheckpointSettings
from gadcore.errors import UserError
from gadcore.record.tracking import read_rows


class Trained(NamedTuple):
    """folder: a Hugging Face directory. system_prompt: what its conversations began with in training, if anything."""

    folder: Path
    system_prompt: str | None


def trained_student(path: Path) -> Trained:
    """The student of a finished run in the folder `path`, or the model whose directory it is.

    Raises UserError where there is none.
    """
    if (path / "config.json").is_file():
        return Trained(path, None)
    settings = path / "config.toml"
    if not settings.is_file():
        raise UserError(f"{path} is neither a run folder nor a model's: give one, for example runs/latest")
    try:
        found = tomllib.loads(settings.read_text(encoding="utf-8"))
        system_prompt = found.get("data", {}).get("system_prompt")
        every = found.get("checkpoint", {}).get("every", CheckpointSettings().every)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings} cannot be read: {error}") from None
    student = path / "student"
    if not (student / "config.json").is_file():
        raise UserError(_unfinished(path, every))
    known = isinstance(system_prompt, str) and system_prompt.lower() != "none"
    return Trained(student, system_prompt if known else None)


def _unfinished(path: Path, every: int) -> str:
    """What helps to the student of a run that has not finished. every: steps between its checkpoints."""
    # Only now: it loads torch.
    from gadcore.checkpoint import store

    folder = shlex.quote(str(path))
    sentence = f"{path} has not finished, so it has no student/"
    goes_on = f"go on with it by --run.dir {folder} --resume auto"
    if store.available(path / "checkpoints"):
        return (
            f"{sentence}: {goes_on}, or write a checkpoint as a model by `gadcore export {folder} --out FOLDER` and "
            "name that folder"
        )
    if not every:
        return f"{sentence}, and no checkpoint, which it writes as it is stopped (checkpoint.every = 0): {goes_on}"
    return (
        f"{sentence}, and no checkpoint yet: wait for the next one, at {_next_checkpoint(path, every)}, while it runs; "
        f"else {goes_on}"
    )


def _next_checkpoint(path: Path, every: int) -> str:
    """When a run writes its next checkpoint: every so many steps, and as a stage ends."""
    try:
        last = read_rows(path / "metrics.jsonl")[-1]
        step, rest = last["step"], last["stage_steps"] - last["stage_step"]
        return f"step {step + min(rest, every - step % every)}"
    except (UserError, LookupError, TypeError):
        # No step yet, or none that tells how long its stage is.
        return f"step {every} or the end of its first stage"
