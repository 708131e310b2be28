"""From a request's groups to texts: rows that they name, limits that they keep, and a file of them for the warmup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gadcore.data.rows import load_rows
from gadcore.errors import UserError
from gadcore.files import parse_json
from gadcore.integrations.service.refused import Refused
from gadcore.integrations.service.schema import GroupIn
from gadcore.integrations.service.settings import RowSettings, ServiceSettings


class Rows:
    """The rows that groups may name by their index, from 0."""

    def __init__(self, settings: RowSettings) -> None:
        """Raises UserError where data.train cannot be read, or a row of it cannot be used."""
        self._source = settings.train
        self._rows = [] if settings.train is None else load_rows(settings.train, settings.columns)

    def __len__(self) -> int:
        return len(self._rows)

    def resolve(self, group: GroupIn) -> dict[str, Any]:
        """All texts of a group, as the journal keeps them and Owner.groups_of() takes them."""
        row = None
        if group.row is not None:
            if self._source is None:
                raise Refused(
                    422, "unknown_row", f"row {group.row} is unknown: the service was started without data.train"
                )
            if group.row >= len(self._rows):
                raise Refused(
                    422, "unknown_row",
                    f"row {group.row} is unknown: {self._source} has the rows 0 to {len(self._rows) - 1}",
                )  # fmt: skip
            row = self._rows[group.row]
        messages: Sequence[Any] | str | None = group.prompt
        if group.messages is not None:
            messages = [message.model_dump() for message in group.messages]
        elif messages is None and row is not None:
            messages = list(row.messages)
        return {
            "id": group.id,
            "messages": messages,
            "teacher": group.teacher_response if row is None else row.teacher_response,
            "teacher_finished": group.teacher_finished,
            "samples": group.samples,
            "finished": group.finished,
        }


def check_limits(groups: Sequence[GroupIn], settings: ServiceSettings) -> None:
    """Raises Refused for a request that is larger than the settings let one be."""
    if len(groups) > settings.most_groups:
        raise _too_large(f"the request has {len(groups)} groups", f"{settings.most_groups} (service.most_groups)")
    for i, group in enumerate(groups):
        if len(group.samples) > settings.most_samples:
            said = f"groups.{i} has {len(group.samples)} samples"
            raise _too_large(said, f"{settings.most_samples} (service.most_samples)")
        texts = [("prompt", group.prompt), ("teacher_response", group.teacher_response)]
        texts += [(f"messages.{k}", message.content) for k, message in enumerate(group.messages or ())]
        texts += [(f"samples.{k}", text) for k, text in enumerate(group.samples)]
        for name, text in texts:
            if text is not None and len(text) > settings.most_characters:
                said = f"groups.{i}.{name} has {len(text)} characters"
                raise _too_large(said, f"{settings.most_characters} (service.most_characters)")


def _too_large(what: str, most: str) -> Refused:
    return Refused(422, "too_large", f"{what}, the service takes {most}: send less")


def read_samples(path: Path, rows: Rows) -> list[dict[str, Any]]:
    """Groups of a file of JSON lines, each as a request has them, resolved. UserError that names the first bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"service.warmup_samples: {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(rows.resolve(GroupIn.model_validate(parse_json(line), strict=True)))
        except ValidationError as error:
            raise UserError(f"{path}:{number}: {sentence(error.errors()[0])}") from None
        except (ValueError, Refused) as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not found:
        raise UserError(f"{path} has no groups: give JSON lines of prompt, teacher_response and samples, or unset it")
    return found


def sentence(error: Any) -> str:
    """One sentence of pydantic's account of what is wrong, which begins with the place."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    told = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    told = told[:1].lower() + told[1:]
    return f"{place}: {told}" if place else told
