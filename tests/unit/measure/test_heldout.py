"""The figures of a held-out evaluation: by hand, with one sample a prompt and with several."""

from __future__ import annotations

import pytest

from gadcore.data.groups import Group, Prompt, Response
from gadcore.measure.heldout import evaluate


def group(teacher: str, *samples: str, cut: int = 0) -> Group:
    """A group whose last `cut` samples have not ended by themselves."""
    prompt = Prompt(0, ({"role": "user", "content": "Say it."},), (1,))
    made = Group(prompt, Response(teacher, (), True))
    made.samples = [Response(text, (), i < len(samples) - cut) for i, text in enumerate(samples)]
    return made


def test_one_sample_a_prompt() -> None:
    figures, rows = evaluate([group("a b c d", "a b c d"), group("y z", "x", cut=1)], None)
    assert figures["rouge_l"] == 0.5 and figures["ngram_f1"] == {"1": 0.5, "2": 0.5, "3": 0.5, "4": 0.5}
    assert (figures["length_ratio"], figures["cut_share"], figures["words"]) == (0.75, 0.5, 2.5)
    assert (figures["rows"], figures["samples"]) == (2, 1)
    assert [row["student"] for row in rows] == ["a b c d", "x"] and "accuracy" not in figures


def test_several_samples_are_averaged_by_prompt() -> None:
    """A prompt weighs as much as another, so a figure is the mean of the rows that are paired between evaluations."""
    groups = [group("a b", "a b", "x y", cut=1), group("c d", "c d", "c d")]
    figures, rows = evaluate(groups, None)
    assert [row["rouge_l"] for row in rows] == [0.5, 1.0] and figures["rouge_l"] == 0.75
    assert figures["cut_share"] == 0.25 and figures["samples"] == 2
    for name in ("rouge_l", "length_ratio", "cut_share", "repeated", "distinct_2", "words"):
        assert figures[name] == pytest.approx(sum(row[name] for row in rows) / len(rows))


def test_repetition_beside_the_teachers() -> None:
    repeats, plain = "we go on and we go on", "we go on and then we stop"
    figures, rows = evaluate([group(plain, repeats, plain), group(repeats, plain, plain)], None)
    assert [row["repeated"] for row in rows] == [0.5, 0.0] and figures["repeated"] == 0.25
    # Six pairs of words each, of which "we go" and "go on" come three times, "on and" twice.
    teacher = {"repeated": 0.5, "distinct_2": pytest.approx(7 / 12), "words": 7.0, "style": pytest.approx(5 / 6)}
    assert figures["teacher"] == teacher


def test_distinct_2_counts_over_one_sample_to_each_prompt() -> None:
    figures, _ = evaluate([group("t", "a b", "a b"), group("t", "a b", "c d")], None)
    assert figures["distinct_2"] == pytest.approx((1 / 2 + 2 / 2) / 2)
    alone, _ = evaluate([group("t", "a b"), group("t", "a b")], None)
    assert alone["distinct_2"] == pytest.approx(1 / 2)
