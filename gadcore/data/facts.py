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
_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in _SCRIPTS.items()}
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
    with the marker of a template in a text. scripts: responses by the script that they are written in.
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        lengths = {name: Lengths(**content[name]) for name in ("prompt", "response")}
        return cls(**{**content, **lengths})


class Survey:
    """Counts the facts of rows, one after the other; some 30 bytes are kept of each."""

    def __init__(self) -> None:
        self._prompt, self._response = array("q"), array("q")
        self._prompts, self._rows = array("Q"), array("Q")
        self._refusals = self._html = 0
        self._turns, self._markers, self._scripts = Counter[str](), Counter[str](), Counter[str]()

    def add(self, row: RawRow, prompt_tokens: int, response_tokens: int) -> None:
        """Tokens: of the whole texts."""
        self._prompt.append(prompt_tokens)
        self._response.append(response_tokens)
        key = prompt_key(row.messages)
        self._prompts.append(key)
        self._rows.append(xxhash.xxh3_64_intdigest(row.teacher_response.encode(), seed=key))
        self._turns.update(message["role"] for message in row.messages)
        self._refusals += _REFUSAL.match(row.teacher_response) is not None
        self._html += _HTML.search(row.teacher_response) is not None
        self._scripts[script_of(row.teacher_response)] += 1
        texts = [row.teacher_response, *(message["content"] for message in row.messages)]
        self._markers.update({marker for text in texts for marker in _markers(text)})

    def facts(self, prompt_limit: int, response_limit: int) -> Facts:
        return Facts(
            len(self._rows),
            Lengths.of(self._prompt, prompt_limit),
            Lengths.of(self._response, response_limit),
            len(self._prompts) - len(np.unique(np.asarray(self._prompts))),
            len(self._rows) - len(np.unique(np.asarray(self._rows))),
            self._refusals,
            self._html,
            dict(self._turns),
            dict(self._markers.most_common(8)),
            dict(self._scripts.most_common()),
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
