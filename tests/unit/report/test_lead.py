"""The first sentences of a report: the most sensitive measure leads, and what the prompts could have shown is said."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

from gadcore.measure.power import rows_needed
from gadcore.report import findings
from gadcore.report.findings import HEADLINES

BASE = {"rouge_l": 0.2, "style": 0.7, "repeated": 0.1, "distinct_2": 0.9, "cut_share": 0.05}


def answers(seed: int, noise: float = 0.05, count: int = 60, **changed: float) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    values = BASE | changed
    return [
        {"prompt": f"p{i}", "teacher": "t", "student": "s", **{k: v + rng.gauss(0, noise) for k, v in values.items()}}
        for i in range(count)
    ]


def told(**evaluations: list[dict[str, Any]]) -> list[str]:
    figures = {
        name: {"rouge_l": fmean(row["rouge_l"] for row in rows), "rows": len(rows)}
        for name, rows in evaluations.items()
    }
    return findings.verdict(figures, evaluations)


def test_the_measure_that_shows_it_best_leads() -> None:
    said = told(before=answers(1), after_gad=answers(2, rouge_l=0.24, style=0.85, repeated=0.0))[0]
    first, second, third = said.removeprefix("Held-out ").split("; ")
    assert first.startswith("the share of the rules of style that responses keep rose from 7")
    assert second.startswith("the share of responses that say a 3-gram twice fell from 1")
    assert third.startswith("ROUGE-L rose from 0.2")
    said = told(before=answers(1), after_gad=answers(2, rouge_l=0.4, style=0.75))[0]
    assert said.startswith("Held-out ROUGE-L rose") and "rules of style" in said


def test_so_many_measures_do_not_lead_by_chance() -> None:
    """Of runs that changed nothing at most one in twenty says that something did."""
    wrong = [
        not told(before=answers(i), after_gad=answers(1000 + i))[0].startswith("Held-out ROUGE-L") for i in range(200)
    ]
    assert sum(wrong) <= 18  # of 10 expected; each of the four alone at 95 % would say so in 38
    assert len(HEADLINES) == 5


def test_what_the_prompts_could_have_shown_and_how_many_it_takes() -> None:
    before, after = answers(1, count=20), answers(2, count=20, rouge_l=0.22)
    said = told(before=before, after_gad=after)
    assert "ROUGE-L did not change measurably" in said[0]
    needed = rows_needed([b["rouge_l"] - a["rouge_l"] for a, b in zip(before, after, strict=True)])
    assert f"one of the size found would take about {needed:,} prompts" in said[1]
    assert said[1].startswith("These prompts show a difference in ROUGE-L of 0.0")
    weak = answers(3, count=20, repeated=0.065)
    assert "the change that takes the fewest is that of" in told(before=before, after_gad=weak)[1]
    clear = told(before=before, after_gad=answers(2, count=20, rouge_l=0.4))
    assert not any("four of five tries" in sentence for sentence in clear)
