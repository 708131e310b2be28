"""What a set of rows is like, counted while it is encoded: lengths, repetitions, and what should not be in a text."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from gadcore.data.forms import RawRow

# Markers of many families, whichever the student's is: in a text they are somebody's template that went wrong.
_MARKERS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<(?:bos|eos|pad)>"
)
_REFUSAL = re.compile(
    r"\W*(?:(?:I['’]?m|I am)(?: very| so)? sorry|sorry|I apologi[sz]e|I can(?:no|['’])t"
    r"|I(?:['’]m| am) (?:not able|unable)|as an AI\b|unfortunately,? I can)",
    re.IGNORECASE,
)
_HTML = re.compile(
    r"</(?:a|b|code|div|em|h[1-6]|i|li|ol|p|pre|span|strong|table|td|tr|u|ul)>|<br ?/?>"
    r"|&(?:nbsp|amp|lt|gt|quot|#\d{2,5});",
    re.IGNORECASE,
)
_SCRIPTS = {
    "Han": "\u3400-\u9fff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
    "Greek": "\u0370-\u03ff",
}
_PLACE = re.compile(r"(.+)(?:(:)(\d{1,18})|(\[)(\d{1,18})\])", re.DOTALL)
_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in _SCRIPTS.items()}
# What databases, pandas and spreadsheets write for a value that is not there.
_MISSING = {"null", "nan", "none", "n/a", "#n/a", "<na>"}
# Rows of one kind that are named.
_NAMED = 10
# Characters at a text's beginning that its script is told by, and the share of one that makes it that script.
_LOOKED_AT, _SHARE = 400, 0.15


@dataclass(frozen=True)
class Lengths:
    """Tokens of whole texts, before anything is cut. over: texts above the limit."""

    mean: float
    median: int
    p95: int
    p99: int
    longest: int
    limit: int
    over: int

    @classmethod
    def of(cls, tokens: Sequence[int], limit: int) -> Lengths:
        values = np.asarray(tokens, dtype=np.int64)
        if not len(values):
            return cls(0.0, 0, 0, 0, 0, limit, 0)
        # A length that so many texts do not exceed, so one that occurs.
        median, p95, p99 = (int(q) for q in np.quantile(values, (0.5, 0.95, 0.99), method="inverted_cdf"))
        return cls(float(values.mean()), median, p95, p99, int(values.max()), limit, int((values > limit).sum()))


@dataclass(frozen=True)
class Facts:
    """Of the rows that could be read.

    prompt, response: in the student's tokens, headers and end markers included. repeated_prompts, repeated_rows: rows
    beyond the first with an equal prompt, or with the response equal as well. turns: messages by their roles.
    refusals: responses that begin as (English) refusals do. html: those with tags or entities of HTML. markers: rows
    with the marker of a template in a text. scripts: responses by the script that they are written in. missing:
    responses that are nothing but the word of a missing value, by the word. places: of the rows that repeated_prompts,
    refusals and missing count, the first few, as RawRow.where has them.
    """

    rows: int
    prompt: Lengths
    response: Lengths
    repeated_prompts: int
    repeated_rows: int
    refusals: int
    html: int
    turns: dict[str, int]
    markers: dict[str, int]
    scripts: dict[str, int]
    missing: dict[str, int]
    places: dict[str, list[str]]

    def named(self, kind: str, count: int) -> str:
        """The first rows of a kind, and how many there are more; "" where there are none.

        kind: "repeated_prompts", "refusals" or "missing".
        """
        return named(self.places[kind], count)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        lengths = {name: Lengths(**content[name]) for name in ("prompt", "response")}
        return cls(**{**content, **lengths})


def named(places: Sequence[str], count: int) -> str:
    """Places of rows, the file once where it is one: "lines 3, 8 and 2 more of rows.csv". count: of all."""
    more = f" and {count - len(places)} more" if count > len(places) else ""
    found = [_split(place) for place in places]
    if not found or len({(stem, mark) for stem, mark, _ in found}) > 1 or not found[0][1]:
        return f"{', '.join(places)}{more}"
    (stem, mark, _), s = found[0], "s" if count > 1 else ""
    numbers = ", ".join(f"{number}" for *_, number in found)
    return f"line{s} {numbers}{more} of {stem}" if mark == ":" else f"row{s} {numbers}{more} (from 0) of {stem}"


def _split(place: str) -> tuple[str, str, int]:
    """(file, ":" or "[", number) of "rows.csv:3" or "rows.parquet[2]"; else (place, "", 0)."""
    found = _PLACE.fullmatch(place)
    return (found[1], found[2] or found[4], int(found[3] or found[5])) if found else (place, "", 0)


class _Places:
    """Where rows are, in some 12 bytes each."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], int] = {}
        self._of, self._numbers = array("i"), array("q")

    def add(self, place: str) -> None:
        stem, mark, number = _split(place)
        self._of.append(self._files.setdefault((stem, mark), len(self._files)))
        self._numbers.append(number)

    def first(self, indices: Sequence[int]) -> list[str]:
        """The places of the first few of some rows."""
        files, ends = list(self._files), {":": "", "[": "]"}
        found = ((*files[self._of[index]], self._numbers[index]) for index in indices[:_NAMED])
        return [f"{stem}{mark}{number}{ends[mark]}" if mark else stem for stem, mark, number in found]


class Survey:
    """Counts the facts of rows, one after the other; some 45 bytes are kept of each."""

    def __init__(self) -> None:
        self._prompt, self._response = array("q"), array("q")
        self._prompts, self._rows = array("Q"), array("Q")
        self._refusals, self._missing_rows = array("q"), array("q")
        self._html = 0
        self._turns, self._markers, self._scripts = Counter[str](), Counter[str](), Counter[str]()
        self._missing = Counter[str]()
        self._places = _Places()

    def add(self, row: RawRow, prompt_tokens: int, response_tokens: int) -> None:
        """Tokens: of the whole texts."""
        self._prompt.append(prompt_tokens)
        self._response.append(response_tokens)
        key = prompt_key(row.messages)
        self._prompts.append(key)
        self._rows.append(xxhash.xxh3_64_intdigest(row.teacher_response.encode(), seed=key))
        self._turns.update(message["role"] for message in row.messages)
        index = len(self._rows) - 1
        self._places.add(row.where)
        if _REFUSAL.match(row.teacher_response):
            self._refusals.append(index)
        if (word := row.teacher_response.strip()).lower() in _MISSING:
            self._missing[word] += 1
            self._missing_rows.append(index)
        self._html += _HTML.search(row.teacher_response) is not None
        self._scripts[script_of(row.teacher_response)] += 1
        texts = [row.teacher_response, *(message["content"] for message in row.messages)]
        self._markers.update({marker for text in texts for marker in _markers(text)})

    def facts(self, prompt_limit: int, response_limit: int) -> Facts:
        first = np.zeros(len(self._prompts), dtype=bool)
        first[np.unique(np.asarray(self._prompts), return_index=True)[1]] = True
        repeated: list[int] = np.flatnonzero(~first).tolist()
        kinds: dict[str, Sequence[int]] = {
            "repeated_prompts": repeated,
            "refusals": self._refusals,
            "missing": self._missing_rows,
        }
        return Facts(
            len(self._rows),
            Lengths.of(self._prompt, prompt_limit),
            Lengths.of(self._response, response_limit),
            len(repeated),
            len(self._rows) - len(np.unique(np.asarray(self._rows))),
            len(self._refusals),
            self._html,
            dict(self._turns),
            dict(self._markers.most_common(8)),
            dict(self._scripts.most_common()),
            dict(self._missing.most_common()),
            {kind: self._places.first(indices) for kind, indices in kinds.items()},
        )


def prompt_key(messages: Sequence[Mapping[str, str]]) -> int:
    """64 bits that are equal for equal conversations."""
    text = "\0".join(part for message in messages for part in (message["role"], message["content"]))
    return xxhash.xxh3_64_intdigest(text.encode())


def script_of(text: str) -> str:
    """The script that most of a text is in; Latin for everything that has no letters of another."""
    text = text[:_LOOKED_AT]
    if text.isascii():
        return "Latin"
    counts = {name: len(letters.findall(text)) for name, letters in _LETTERS.items()}
    name = max(counts, key=lambda script: counts[script])
    return name if counts[name] > _SHARE * len(text) else "Latin"


def _markers(text: str) -> list[str]:
    return _MARKERS.findall(text) if "<" in text or "[" in text else []
