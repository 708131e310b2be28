"""Rules that a response keeps or breaks, whoever wrote it: what can be checked of a style without a model.

    ended        it ended by itself
    word_range   its words are as many as those of nine in ten of the teacher's responses
    no_repeats   no three words in a row occur twice
    lists        numbered items count 1, 2, 3, .. from the first on, bullets are of one kind, two items at least
    equations    what stands in it as `3 x 4 + 2 = 14` is right
    numbers      the one new number of the teacher's first sentence, to a prompt with numbers, is in it

The last three are asked only of responses that have such a thing, and only of prompts that ask for a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import numpy as np

from gadcore.measure.diversity import repetition
from gadcore.measure.likeness import words

CHECKS = ("ended", "word_range", "no_repeats", "lists", "equations", "numbers")
# Of the teacher's lengths: the middle nine in ten.
_RANGE = (0.05, 0.95)
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_ITEM = re.compile(r"(?:^|(?<=[\s:;]))\(?(\d{1,2})\)\s|^\s*(\d{1,2})\.\s", re.MULTILINE)
_BULLET = re.compile(r"^\s*([-*•])\s+\S", re.MULTILINE)
_TERM = rf"-?{_NUMBER}"
_EQUATION = re.compile(rf"({_TERM}(?:\s*[-+−x×*÷/]\s*{_TERM})+)\s*=\s*({_TERM})(?!\s*[-+−x×*÷/%]\s*\d|[\d%])")
_PARTS = re.compile(rf"\s*([-+−x×*÷/])?\s*({_TERM})")
# Results are often rounded to two decimals.
_CLOSE = 6e-3


def word_range(teacher: Sequence[str]) -> tuple[float, float]:
    """The least and most words of the middle nine in ten of the teacher's responses, at least one."""
    low, high = np.quantile([len(words(text)) for text in teacher], _RANGE)
    return float(low), float(high)


def checks(text: str, finished: bool, prompt: str, teacher: str, within: tuple[float, float]) -> dict[str, float]:
    """{check: whether it is kept, or the share that is}, of the checks that apply. within: word_range()."""
    found: dict[str, float | None] = {
        "ended": float(finished),
        "word_range": float(within[0] <= len(words(text)) <= within[1]),
        "no_repeats": float(repetition(text, 3) == 0),
        "lists": lists(text),
        "equations": equations(text),
        "numbers": numbers(text, prompt, teacher),
    }
    return {name: value for name, value in found.items() if value is not None}


def score(kept: Mapping[str, float]) -> float:
    """Mean of checks()."""
    return fmean(kept.values())


def lists(text: str) -> float | None:
    """Whether every list is numbered right and has one kind of bullet; None for a text without any."""
    items = [int(one or other) for one, other in _ITEM.findall(text)]
    bullets = _BULLET.findall(text)
    if not items and not bullets:
        return None
    # A list begins wherever the count is 1 again.
    begins = [i for i, item in enumerate(items) if item == 1 or i == 0]
    runs = [items[a:b] for a, b in pairwise([*begins, len(items)])]
    right = all(len(run) > 1 and run == list(range(1, len(run) + 1)) for run in runs)
    return float(right and (not bullets or (len(bullets) > 1 and len(set(bullets)) == 1)))


def equations(text: str) -> float | None:
    """The share of a text's equations that are right; None for a text without any."""
    found = [_near(_value(left), _number(right)) for left, right in _EQUATION.findall(text)]
    return fmean(found) if found else None


def numbers(text: str, prompt: str, teacher: str) -> float | None:
    """Whether a response has the number that the teacher answers with; None where the prompt has no number, or where
    the first sentence of the teacher has no new one, or several."""
    asked = _numbers(prompt)
    new = _numbers(re.split(r"(?<=[.!?])\s", teacher, maxsplit=1)[0]) - asked
    if not asked or len(new) != 1:
        return None
    return float(new <= _numbers(text))


def _numbers(text: str) -> set[float]:
    return {_number(found) for found in re.findall(_NUMBER, text)}


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _CLOSE * max(1.0, abs(other))


def _value(left: str) -> float:
    """Of sums and products, products first; infinite where something is divided by 0."""
    total, product = 0.0, 0.0
    for sign, term in _PARTS.findall(left):
        number = _number(term)
        if sign in ("x", "×", "*"):
            product *= number
        elif sign in ("÷", "/"):
            product = product / number if number else float("inf")
        else:
            total, product = total + product, -number if sign in ("-", "−") else number
    return total + product
