"""Which columns of a source are prompt and response, where no column has a name that a form knows: a guess, for advice.

Names tell it first. Where they do not, the texts do: a teacher's responses are mostly the longest texts of a table, the
prompts the next. Columns of numbers, dates and identifiers are never taken.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gadcore.config.writing import to_toml
from gadcore.data.forms import LackingColumns
from gadcore.data.sources import Source
from gadcore.errors import UserError

PROMPT, RESPONSE = "prompt", "teacher_response"
# Stands for a column that nobody but the user knows.
UNKNOWN = "COLUMN"
# Words in a column's name: (those that settle it, those that point there).
_WORDS = {
    PROMPT: ({"prompt", "question", "query", "instruction", "input", "problem"}, {"user", "human", "task", "ask"}),
    RESPONSE: (
        {
            "answer",
            "response",
            "output",
            "completion",
            "reply",
            "solution",
            "chosen",
            "target",
            "summary",
            "translation",
        },
        {"assistant", "gpt", "chatgpt", "claude", "bot", "teacher"},
    ),
}
# A word in a column's name by which it holds neither.
_NO_TEXT = re.compile(
    r"id|uuid|idx|index|number|num|nr|date|time|timestamp|datetime|created|updated|year|day|token"
    r"|length|len|count|score|rating|rank|url|uri|link|lang|language|category|tag|type|hash|version"
    r"|split|author|name|email|system|history|rejected"
)
_MONTHS = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
# A whole value that is a number, a date, an address, or an identifier: one ASCII word with a digit in it.
_CODE = re.compile(
    rf"[-+\d.,:/%$€£ ]+|(?:\d{{1,2}}\.? )?{_MONTHS} (?:\d{{1,2}},? )?\d{{4}}"
    r"|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}[T ]\S*|https?://\S+|(?=\S*\d)[!-~]+|true|false|yes|no",
    re.IGNORECASE,
)
_SHARE = 0.9
# Rows that are looked at, and rows that are passed on the way to them.
_LOOKED_AT, _PASSED = 200, 2000
_PLAIN = re.compile(r"[\w=,.+-]+")


@dataclass(frozen=True)
class Advice:
    """A column map that would make rows of rows that lack columns.

    columns: (name of a form, column) of what the user has mapped rightly, and of what was guessed, UNKNOWN where
    nothing tells it. names: all columns.
    """

    columns: tuple[tuple[str, str], ...]
    names: tuple[str, ...]

    @property
    def missing(self) -> str:
        """What stands for UNKNOWN, as the end of a sentence."""
        if UNKNOWN not in (column for _, column in self.columns):
            return ""
        return f", where {UNKNOWN} is one of {', '.join(map(str, self.names))}"


def by_setting(key: str) -> Callable[[Advice], str]:
    """How advice is told by a command that has the column map as the setting `key`."""

    def told(advice: Advice) -> str:
        # No line end, comma or space at an end comes through the form of the command line.
        if any(column != column.strip() or "," in column or not column.isprintable() for _, column in advice.columns):
            section, _, name = key.partition(".")
            table = f"{name} = {to_toml(dict(advice.columns))}"
            return f"name the columns by {table} in the table [{section}] of a file for --config{advice.missing}"
        pairs = ",".join(f"{name}={column}" for name, column in advice.columns)
        return f"name the columns by --{key} {quoted(pairs)}{advice.missing}"

    return told


by_data_columns = by_setting("data.columns")


def quoted(text: str) -> str:
    """One word for a shell."""
    if _PLAIN.fullmatch(text) and UNKNOWN not in text:
        return text
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


def advise(error: LackingColumns, source: Source) -> Advice | None:
    """Advice for rows like the one that was refused, by what the source holds; None where none would help."""
    twice: Iterable[str] = getattr(error.record, "twice", ())
    free = [name for name in error.free if name not in twice and isinstance(name, str)]
    if not error.lacking or len(free) < len(error.lacking):
        return None
    samples = _samples(source, error.names) or [error.record]
    texts = {name: [row[name] for row in samples if row.get(name) not in (None, "")] for name in free}
    guess = _guess(error.lacking, texts)
    return Advice((*error.kept.items(), *((name, guess.get(name, UNKNOWN)) for name in error.lacking)), tuple(free))


def _samples(source: Source, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Some of the source's rows that have these columns, with the texts of all of them."""
    wanted = None
    if source.table is not None:
        wanted = [name for name, kind in source.table.features.items() if getattr(kind, "dtype", None) == "string"]
    found: list[Mapping[str, Any]] = []
    # What cannot be read is told by whoever reads all rows.
    with suppress(UserError):
        for _, record in islice(source.records(wanted), _PASSED):
            if isinstance(record, Mapping) and tuple(getattr(record, "names", record)) == tuple(names):
                found.append(record)
            if len(found) == _LOOKED_AT:
                break
    return found


def _guess(lacking: Sequence[str], texts: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """{name of a form: column}, without those that nothing tells. texts: of every column, the values that are there."""
    named = [name for name in texts if not any(map(_NO_TEXT.fullmatch, _words(name)))]
    usable = [name for name in named if _readable(texts[name])]
    found: dict[str, str] = {}
    settled = False
    for side in lacking:
        ranked = [(score, _length(texts[name]), name) for name in usable if (score := _score(name, side)) > 0]
        if ranked:
            score, _, found[side] = max(ranked, key=lambda item: item[:2])
            settled |= score > 1
    if len(found) == 1 < len(lacking) and not settled:
        # A column "user" alone may be names.
        found.clear()
    left = [name for name in usable if name not in found.values() and texts[name] and not _category(texts[name])]
    left.sort(key=lambda name: -_length(texts[name]))
    # A column of that name that holds no text: another one's texts would be something else.
    other = {side for side in lacking for name in named if name not in usable and _score(name, side) > 1}
    open_sides = [side for side in (RESPONSE, PROMPT) if side in lacking and side not in found and side not in other]
    # Where a response is not asked for, the longest text may be one.
    if len(left) >= len(open_sides) and (tuple(lacking) != (PROMPT,) or len(left) == 1):
        found |= dict(zip(open_sides, left, strict=False))
    return found


def _words(name: str) -> set[str]:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+", name)
    return {word.lower().removesuffix("s") for word in words}


def _score(name: str, side: str) -> int:
    """How much a column's name speaks for a side; below 0 where it speaks for the other one."""
    words = _words(name)
    sums = {key: 2 * len(words & settle) + len(words & point) for key, (settle, point) in _WORDS.items()}
    return 2 * sums[side] - sum(sums.values())


def _readable(values: Sequence[Any]) -> bool:
    """Whether most of the values are texts, and most of the texts no numbers, dates or identifiers."""
    texts = [value.strip() for value in values if isinstance(value, str)]
    codes = sum(_CODE.fullmatch(text[:200]) is not None for text in texts)
    return not values or (len(texts) >= _SHARE * len(values) and codes < _SHARE * len(texts))


def _category(texts: Sequence[str]) -> bool:
    """Whether the values are a few short ones again and again."""
    return len(texts) >= 8 and len(set(texts)) * 4 <= len(texts) and _length(texts) < 40


def _length(values: Sequence[Any]) -> float:
    """Characters of a value, on average."""
    return sum(len(value) for value in values if isinstance(value, str)) / max(1, len(values))
