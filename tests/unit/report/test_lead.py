"""The first sentences of a report: the most sensitive measure leads, and what the prompts could have shown is said."""

from __future__ import annotations

import random
import re
from statistics import fmean
from typing import Any

from gadcore.measure.power import rows_needed
from gadcore.report import findings, parts
from gadcore.report.findings import HEADLINES

BASE = {"rouge_l": 0.2, "style": 0.7, "word_range": 0.6, "repeated": 0.1, "distinct_2": 0.9, "cut_share": 0.05}


def answers(
    seed: int, noise: float = 0.05, count: int = 60, student: str = "", **changed: float
) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    values = BASE | changed
    return [
        {
            "prompt": f"p{i}",
            "teacher": "t",
            "student": student or f"s{seed}",
            **{k: v + rng.gauss(0, noise) for k, v in values.items()},
        }
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
    assert sum(wrong) <= 18  # of 10 expected; each of the five alone at 95 % would say so in 45
    assert {path[0] for path in HEADLINES} == set(BASE)


def test_the_first_sentence_is_what_gad_did_where_stages_came_before_it() -> None:
    before, sft = answers(1), answers(2, rouge_l=0.4, style=0.85)
    said = told(before=before, after_sft=sft, after_gad=answers(3, rouge_l=0.4, style=0.85, repeated=0.0))
    assert said[0].startswith(
        "GAD made the student better: on 60 held-out prompts the share of responses that say a 3-gram twice fell from "
    )
    assert re.search(r"fell from 1?\d\.\d % to -?\d\.\d % \(−\d+\.\d ± \d\.\d pp\)\.$", said[0])
    assert "ROUGE-L" not in said[0] and said[1].startswith("Held-out ROUGE-L rose") and "by SFT" in said[1]


def test_the_first_sentence_says_plainly_that_gad_made_nothing_better() -> None:
    before, sft = answers(1), answers(2, rouge_l=0.4, style=0.85)
    said = told(before=before, after_sft=sft, after_gad=answers(3, rouge_l=0.4, style=0.85))
    assert said[0] == "GAD made nothing better that 60 held-out prompts can show, and nothing worse."
    assert said[1].startswith("Held-out ROUGE-L rose")
    shorter = answers(3, rouge_l=0.4, style=0.85, word_range=0.3)
    said = told(before=before, after_sft=sft, after_gad=shorter)
    assert said[0].startswith(
        "GAD made nothing better that 60 held-out prompts can show; worse on 60 held-out prompts: "
    )
    assert "the share of responses as long as the teacher's fell from " in said[0]
    mixed = answers(3, rouge_l=0.4, style=0.85, word_range=0.3, repeated=0.0)
    said = told(before=before, after_sft=sft, after_gad=mixed)
    assert re.match(r"GAD made the student better: on 60 .* twice fell .*\. But worse on 60 .* fell from", said[0])


def test_more_variety_alone_makes_no_student_better() -> None:
    before, sft = answers(1), answers(2, rouge_l=0.4, style=0.85)
    said = told(before=before, after_sft=sft, after_gad=answers(3, rouge_l=0.4, style=0.85, distinct_2=0.99))
    assert re.fullmatch(
        r"GAD made nothing better that 60 held-out prompts can show, and nothing worse\. It moved what a higher "
        r"temperature moves as well: distinct-2 rose from 0\.\d+ to \d\.\d+ \(\+0\.\d+ ± 0\.\d+\)\.",
        said[0],
    )


def test_a_stage_of_the_discriminator_alone_has_no_change_to_show() -> None:
    """The same responses, which it has judged since: zeros would be read as a measurement."""
    before, sft = answers(1), answers(2, rouge_l=0.4, student="x")
    judged = [row | {"accuracy": 0.7, "margin": 0.1} for row in sft]
    after = [row | {"accuracy": 0.6, "margin": 0.1} for row in answers(3, rouge_l=0.4, student="y")]
    said = told(before=before, after_sft=sft, after_warmup=judged, after_gad=after)
    (stages,) = (sentence for sentence in said if sentence.startswith("Stage by stage"))
    assert re.search(r"SFT \+0\.\d+ ± 0\.\d+; warmup left the student as it was; GAD [+−]0", stages)
    rows = {"before": before, "after_sft": sft, "after_warmup": judged, "after_gad": after}
    figures = {name: {"rouge_l": 0.4, "accuracy": each[0].get("accuracy")} for name, each in rows.items()}
    table = parts.table_of(figures, rows, findings.pretty, "")
    assert table["changes"] == ["before → after GAD", "before → after SFT", "after warmup → after GAD"]
    for row in [*before, *sft, *judged, *after]:
        row["length_ratio"] = 1.0
    (shown, *_) = parts.samples_of(rows)
    assert [side["label"] for side in shown["sides"]] == ["teacher", "before", "after SFT, after warmup", "after GAD"]
    # Judged again by another discriminator, the same responses have a change: the discriminator's.
    figures["after_sft"]["accuracy"] = 0.5
    assert "after SFT → after warmup" in parts.table_of(figures, rows, findings.pretty, "")["changes"]


def test_of_gad_nothing_is_said_by_rows_that_do_not_show_it() -> None:
    one = told(before=answers(1, count=1), after_sft=answers(2, count=1), after_gad=answers(3, count=1))
    assert not any("GAD made" in sentence for sentence in one)
    assert not any("GAD made" in s for s in told(before=answers(1), after_sft=answers(2), after_warmup=answers(3)))


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


def scored(rows: list[dict[str, Any]], pays: float) -> list[dict[str, Any]]:
    """The rows with four samples each, whose scores are `pays` times their words, and noise."""
    rng = random.Random(11)
    for row in rows:
        counts = [rng.randint(3, 20) for _ in range(4)]
        row["samples"] = [
            {"text": " ".join(rng.choices("rstuvwxy", k=n)), "finished": True, "score": pays * n + rng.gauss(0, 0.5)}
            for n in counts
        ]
    return rows


def test_what_gad_could_learn_stands_behind_what_changed() -> None:
    before = answers(1)
    sft = scored(answers(2, rouge_l=0.4, style=0.85), pays=1.0)
    said = told(before=before, after_sft=sft, after_gad=answers(3, rouge_l=0.4, style=0.85))
    assert re.match(
        r"Why GAD made nothing better: GAD climbs the discriminator's score\. As GAD began, it scored of a prompt's "
        r"responses longer ones higher \(correlation \+\d\.\d\d \[\+\d\.\d\d, \+\d\.\d\d\]\); of equally long ones ",
        said[2],
    )
    assert (
        "those that keep more rules of style (" in said[2] and "those nearer to the teacher's by ROUGE-L (" in said[2]
    )
    sft = scored(answers(2, rouge_l=0.4, style=0.85), pays=-1.0)
    said = told(before=before, after_sft=sft, after_gad=answers(3, rouge_l=0.4, style=0.85, repeated=0.0))
    assert said[0].startswith("GAD made the student better")
    assert said[2].startswith("GAD climbs the discriminator's score.") and " shorter ones higher (" in said[2]
    sft = scored(answers(2, rouge_l=0.4, style=0.85), pays=0.0)
    said = told(before=before, after_sft=sft, after_gad=answers(3, rouge_l=0.4, style=0.85))
    assert (
        " longer and shorter ones alike (" in said[2] and "; of equally long ones no higher those that keep" in said[2]
    )
