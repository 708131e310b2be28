"""The section of docs/measured/findings.md on real text, from made-up rows."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from bench.paper import real_text, svg, tables

KEYS = ("fresh_accuracy", *real_text.GRAMS, "rouge_l", "length_ratio", "words", "distinct_2", "repetition", "cut_share")


def estimate(mean: float, half: float = 0.05) -> dict:
    return {"mean": mean, "interval": [mean - half, mean + half], "n": 64}


def row(run: str, step: int, seconds: float, value: float) -> dict:
    training = {"student": "tiny", "steps": {"warmup": 28, "gad": 32}, "batch_size": 4, "group_size": 4, "threads": 1,
                "lr": 1e-5, "warmup_lr": 5e-5, "seqkd_lr": 5e-5, "discriminator_lr": 3e-5}  # fmt: skip
    fresh = {"steps": 16, "batch_size": 8, "lr": 3e-5, "cross_fit": False}
    return {
        "run": run, "step": step, "seconds": seconds, "prompts": 64, "measures": {key: estimate(value) for key in KEYS},
        "settings": {"fresh": fresh, "max_response_tokens": 128, "temperature": 0.8}, "training": training,
    }  # fmt: skip


def rows(*, last: float = 1000.0, other: float = 0.8, difference: float = -0.2) -> list[dict]:
    """gad at 500 and 1000 s with .6, seqkd at 510 s and `last` with `other`."""
    made = [row("start", 0, 0.0, 0.9), row("gad", 30, 500.0, 0.6), row("gad", 60, 1000.0, 0.6)]
    made += [row("seqkd", 70, 510.0, other), row("seqkd", 140, last, other)]
    made[0]["teacher"] = {"words": estimate(70.0, 0.5), "cut_share": estimate(0.25)}
    differences = {key: estimate(difference) for key in KEYS}
    for mine, beside in ((made[1], made[3]), (made[2], made[4])):
        mine["beside"] = {
            "seqkd": {"step": beside["step"], "seconds": beside["seconds"], "differences": differences},
        }
    return made


def verdict(made: list[dict]) -> str:
    text = "\n".join(real_text.section(made))
    return text[text.index("### What it shows") : text.index("### Over training time")]


def test_the_verdict_says_who_is_lower_and_whether_the_intervals_overlap() -> None:
    told = verdict(rows())
    assert "At equal compute: gad after 60 steps (1000 s) and seqkd after 140 steps (1000 s)." in told
    assert (
        "Fresh accuracy: gad 0.600 [0.550, 0.650], seqkd 0.800 [0.750, 0.850]; gad is lower, the intervals do not "
        "overlap; paired difference -0.200 [-0.250, -0.150], which excludes 0."
    ) in told
    assert "4-gram F1: gad 0.600" in told
    assert "the teacher 70; 60% and 80% of the responses are cut at the limit, 25% of the teacher's." in told

    told = verdict(rows(other=0.52, difference=0.02))
    assert "gad is higher, the intervals overlap" in told and "which does not exclude 0" in told


@pytest.mark.parametrize(("last", "step"), [(1090.0, 60), (1200.0, 30)])
def test_the_latest_checkpoints_that_trained_equally_long_are_compared(last: float, step: int) -> None:
    mine, other = real_text.equal_compute(rows(last=last), "gad", "seqkd")
    assert mine["step"] == step and other["step"] == {60: 140, 30: 70}[step]


def test_without_equal_compute_nothing_is_compared() -> None:
    made = rows(last=1200.0)
    made[3]["seconds"] = made[1]["beside"]["seqkd"]["seconds"] = 900.0
    assert "No checkpoints of gad and seqkd lie within 10% of each other's seconds." in verdict(made)


def test_tables_hold_every_point_and_mark_what_excludes_zero() -> None:
    text = "\n".join(real_text.section(rows()))
    assert "take 16 steps of 8 pairs at 3e-05; one half is judged." in text
    assert "| gad | 60 | 1000 | 0.600 [0.550, 0.650] |" in text and "| seqkd | 70 | 510 |" in text
    assert "| teacher | - | - | - | - | 70.0 [69.5, 70.5] |" in text
    assert "| 60 (1000 s) | 140 (1000 s) | -0.200 [-0.250, -0.150] * |" in text


def test_the_fresh_test_may_have_been_left_out() -> None:
    made = rows()
    for each in made:
        del each["measures"]["fresh_accuracy"]
        for beside in each.get("beside", {}).values():
            beside["differences"] = {k: v for k, v in beside["differences"].items() if k != "fresh_accuracy"}
    assert "Fresh accuracy:" not in verdict(made)
    assert "findings-real-fresh-accuracy.svg" not in real_text.drawings(made)


def test_drawings_have_a_bar_for_every_interval() -> None:
    drawing = ElementTree.fromstring(real_text.drawings(rows())["findings-real-words.svg"])
    paths = list(drawing.iter("{http://www.w3.org/2000/svg}path"))
    assert sum(p.get("class") == "bar" for p in paths) == 6  # three points of each run
    assert sum(p.get("fill") == "none" for p in paths) == 3  # and the teacher
    ends = [end for p in paths if p.get("class") == "bar" for end in p.get("d")[1:].split("L")]
    heights = [float(end.split(",")[1]) for end in ends]
    assert min(heights) >= svg.TOP and max(heights) <= svg.HEIGHT - svg.BOTTOM


def test_the_document_has_the_section() -> None:
    text = tables.document(lambda suite: rows() if suite == "real" else [])
    assert "## On real text" in text and "At equal compute: gad" in text
    assert "there is no `bench/results/real.json`" in tables.document(lambda suite: [])


def test_a_chart_of_zeros_is_drawn() -> None:
    assert "NaN" not in svg.lines("none", "step", {"one": [[(0, 0.0), (1, 0.0)]]})
