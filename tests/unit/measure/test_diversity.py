from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadcore.measure.diversity import distinct_values, repetition
from gadcore.measure.likeness import words

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=6).map(" ".join), min_size=1, max_size=6)


def distinct(texts: list[str], n: int) -> float:
    grams = [tuple(w[i : i + n]) for w in map(words, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d e", 4, 0.0),
        ("a b a b a b a b", 4, 1 - 2 / 5),
        ("a a a a", 1, 3 / 4),
        ("No. No! NO", 1, 2 / 3),
        ("too short", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition(text: str, n: int, expected: float) -> None:
    assert repetition(text, n) == pytest.approx(expected)


@given(TEXTS, st.integers(1, 3))
def test_the_values_are_the_jackknifes(texts: list[str], n: int) -> None:
    values = distinct_values(texts, n)
    assert sum(values) / len(values) == pytest.approx(distinct(texts, n), abs=1e-12)
    without = [distinct(texts[:i] + texts[i + 1 :], n) for i in range(len(texts))]
    for i in range(len(texts)):
        for j in range(len(texts)):
            expected = (len(texts) - 1) * (without[j] - without[i])
            assert values[i] - values[j] == pytest.approx(expected, abs=1e-12)


def test_a_model_that_always_says_the_same_is_not_varied() -> None:
    assert distinct_values(["the same words"] * 20, 1) == [pytest.approx(1 / 20)] * 20
    assert distinct_values(["a b", "c d", "e f"], 2) == [pytest.approx(1)] * 3
