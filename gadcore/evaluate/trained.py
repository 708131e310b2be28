"""The student of a run, for a person who wants to use it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

from gadcore.errors import UserError


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
    student = path / "student"
    if not (student / "config.json").is_file():
        raise UserError(
            f"{path} has not finished, so it has no student/: go on with it by --resume auto, or write a checkpoint "
            f"as a model by `gadcore export {path} --out FOLDER` and name that folder"
        )
    try:
        found = tomllib.loads(settings.read_text(encoding="utf-8")).get("data", {}).get("system_prompt")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings} cannot be read: {error}") from None
    return Trained(student, found if isinstance(found, str) and found.lower() != "none" else None)
