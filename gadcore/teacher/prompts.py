"""Prompts out of the sources of training data, where no response is needed, and out of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gadcore.data.columns import advise, by_setting
from gadcore.data.forms import CONVERSATIONS, RESPONSES, LackingColumns, parse_row, wanted_columns
from gadcore.data.records import Record
from gadcore.data.rows import BadRow, BadRows
from gadcore.data.sources import Source
from gadcore.errors import UserError
from gadcore.teacher.settings import PromptSettings

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class PromptRow:
    """messages: a conversation, a user's turn at its end. source: the row's own column `source`, else its place."""

    messages: Messages
    source: str


def read_prompts(settings: PromptSettings) -> list[PromptRow]:
    """The prompts of a source, in order; raises UserError that names whatever cannot be used, with its line or row."""
    if not settings.source:
        raise UserError("no prompts are named: set prompts.source to a file, directory or hub id")
    for name in settings.columns:
        if name not in CONVERSATIONS:
            raise UserError(f"prompts.columns has no use for {name!r}: it maps {', '.join(CONVERSATIONS)}")
    plain = settings.source.endswith(".txt")
    found = _plain_text(Path(settings.source)) if plain else _rows(settings.source, settings.columns)
    prompts, bad = list[PromptRow](), BadRows(told=by_setting("prompts.columns"))
    for row in islice(found, settings.rows):
        bad.read += 1
        if isinstance(row, PromptRow):
            prompts.append(row)
            continue
        bad.add(row)
        if bad.hopeless:
            break
    if bad.count:
        raise bad.error(settings.source)
    if not prompts:
        raise UserError(f"{settings.source} has no prompts")
    return prompts


def asked_messages(row: PromptRow, system_prompt: str | None) -> Messages:
    """The conversation as the teacher is asked it."""
    if system_prompt is None or row.messages[0]["role"] == "system":
        return row.messages
    return ({"role": "system", "content": system_prompt}, *row.messages)


def _plain_text(path: Path) -> Iterator[PromptRow | BadRow]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise UserError(f"the file of prompts {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the file of prompts {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            yield BadRow(f"{path}:{number}", "not UTF-8: save the file as UTF-8")
            continue
        if text:
            yield PromptRow(({"role": "user", "content": text},), f"{path}:{number}")


def _rows(source: str, columns: Mapping[str, str]) -> Iterator[PromptRow | BadRow]:
    found = Source.find(source, "train")
    advice, asked = None, False
    for where, record in found.records({*wanted_columns(columns), "source"}):
        try:
            messages = _parse(record, columns, where)
        except UserError as error:
            if isinstance(error, LackingColumns) and not asked:
                advice, asked = advise(error, found), True
            yield BadRow(where, str(error).removeprefix(f"{where}: "), advice)
            continue
        name = record.get("source")
        yield PromptRow(messages, name if isinstance(name, str) and name else where)


def _parse(record: Any, columns: Mapping[str, str], where: str) -> Messages:
    """The conversation of one record; a teacher's turn at its end, or in a column of its own, is left away."""
    if isinstance(record, Mapping):
        mapped = set(columns.values())
        kept = {name: value for name, value in record.items() if name in mapped or name not in RESPONSES}
        record = Record(kept.items(), getattr(record, "names", tuple(record)), getattr(record, "twice", ()))
        for name in ("messages", "content", "conversations"):
            turns = record.get(columns.get(name, name))
            if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
                last = turns[-1].get("role", turns[-1].get("from")) in ("assistant", "gpt")
                record[columns.get(name, name)] = turns[:-1] if last else turns
        # Any text: a row of training data has a response, and its rules for prompts are those that hold here.
        record["teacher_response"] = "-"
    return parse_row(record, columns, where).messages
