"""Rules of style by hand, and how many rows a difference needs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from gadcore.measure.intervals import margin
from gadcore.measure.power import least_seen, rows_needed
from gadcore.measure.style import checks, equations, lists, numbers, score, word_range

BUILTIN = Path(__file__).parents[3] / "gadcore/data/builtin"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("No list here, only 3) of them.", 0.0),
        ("No list here.", None),
        ("In 1999. Then 2. More", None),
        ("Three: 1) a; 2) b; 3) c.", 1.0),
        ("Three: 1) a; 3) b; 4) c.", 0.0),
        ("One: 1) a.", 0.0),
        ("Two: (1) a, (2) b.", 1.0),
        ("1. a\n2. b\n\nThen:\n1. c\n2. d", 1.0),
        ("1. a\n2. b\n2. c", 0.0),
        ("- a\n- b", 1.0),
        ("- a\n* b", 0.0),
        ("- a", 0.0),
        ("f(1) is 2 and g(2) is 3", None),
    ],
)
def test_lists(text: str, right: float | None) -> None:
    assert lists(text) == right


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Twelve.", None),
        ("3 + 4 = 7", 1.0),
        ("3 + 4 x 2 = 11 and 2 × 3 = 5", 0.5),
        ("10 ÷ 4 = 2.5, 10 / 3 = 3.33", 1.0),
        ("1,000 - 1 = 999", 1.0),
        ("5 - 7 = -2", 1.0),
        ("8 − 3 − 2 = 3", 1.0),
        ("4 / 0 = 4", 0.0),
        ("x = 4 and y = 3", None),
        ("20 x 3 = 60 - 1", None),
    ],
)
def test_equations(text: str, share: float | None) -> None:
    assert equations(text) == share


def test_numbers_are_those_that_the_teacher_answers_with() -> None:
    prompt, teacher = "What is the least common multiple of 12 and 18?", "It is 36. Among the multiples of 18, two."
    assert numbers("36 it is.", prompt, teacher) == 1.0 and numbers("It is 72.", prompt, teacher) == 0.0
    assert numbers("It is 36.", "What is it?", teacher) is None
    assert numbers("It is 36.", prompt, "It is 36 or 72.") is None and numbers("x", prompt, "It is 12.") is None


def test_the_rules_of_a_response() -> None:
    within = word_range([" ".join("w" * n) for n in range(1, 101)])
    assert within == pytest.approx((5.95, 95.05))
    kept = checks("one two three four five six", True, "Say it.", "t", within)
    assert kept == {"ended": 1.0, "word_range": 1.0, "no_repeats": 1.0} and score(kept) == 1.0
    broken = checks("1) a b c; 3) a b c; 1 + 1 = 3", False, "1 + 1?", "It is 2.", within)
    assert broken == {
        "ended": 0.0,
        "word_range": 1.0,
        "no_repeats": 0.0,
        "lists": 0.0,
        "equations": 0.0,
        "numbers": 0.0,
    }


def test_the_house_rows_keep_their_own_style() -> None:
    rows = [json.loads(line) for line in (BUILTIN / "eval.jsonl").read_text().splitlines()]
    within = word_range([row["teacher_response"] for row in rows])
    kept = [checks(r["teacher_response"], True, r["prompt"], r["teacher_response"], within) for r in rows]
    assert sum(map(score, kept)) / len(kept) > 0.95
    lists_kept = [k["lists"] for k, row in zip(kept, rows, strict=True) if row["kind"] in ("list", "how_to")]
    assert lists_kept == [1.0] * 11
    assert all(k[name] == 1.0 for k in kept for name in ("equations", "numbers") if name in k)
    assert sum("numbers" in k for k in kept) >= 4


def test_rows_needed_see_the_difference_in_four_of_five_tries() -> None:
    rng = random.Random(0)
    seen = [rng.gauss(0.3, 1.0) for _ in range(4000)]
    needed = rows_needed(seen)
    assert needed is not None and needed == pytest.approx((2.8016 / 0.3) ** 2, rel=0.15)
    tries = [[rng.gauss(0.3, 1.0) for _ in range(needed)] for _ in range(400)]
    found = sum(abs(sum(d) / needed) > (margin(d) or math.inf) for d in tries) / len(tries)
    assert 0.72 < found < 0.88
    least = least_seen(seen)
    assert least == pytest.approx(2.8016 / math.sqrt(4000), rel=0.05)
    assert rows_needed([1.0]) is None and rows_needed([1.0, -1.0]) is None and rows_needed([1.0, 1.0]) == 2


def test_margins_of_several_comparisons_hold_together() -> None:
    values = [0.1, 0.4, -0.2, 0.3, 0.0, 0.5]
    # Student's t at 5 degrees of freedom: .975 and .995.
    assert margin(values, 5) / margin(values) == pytest.approx(4.0321 / 2.5706, rel=2e-3)
    assert margin(values[:3], 5) / margin(values[:3]) == pytest.approx(9.9248 / 4.3027, rel=1e-3)
    assert margin(values[:2], 5) / margin(values[:2]) == pytest.approx(63.657 / 12.706, rel=1e-3)
