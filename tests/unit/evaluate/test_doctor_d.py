"""The doctor of the discriminator: a healthy one, and ones broken on purpose, each trained for real on tiny models."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from gadcore.data.groups import Group, Prompt
from gadcore.evaluate.doctor_d import Evidence, Finding, FromModel, examine, verdict
from gadcore.measure.heldout import evaluate
from tests.support.builders import TEMPLATE, discriminator, response

PLACES = ["Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo"]
Text = Callable[[random.Random], str]


def teacher_text(rng: random.Random) -> str:
    return f"The city {rng.choice(PLACES)} is on the river {rng.choice(PLACES)}, a short way from {rng.choice(PLACES)}."


def flawed_text(rng: random.Random) -> str:
    """Four of five samples have a word that the teacher never says, in the middle."""
    text = teacher_text(rng)
    return text.replace("river", "zero") if rng.random() < 0.8 else text


@dataclass
class Case:
    """How the two sides write, and how D is trained."""

    teacher: Text = teacher_text
    student: Text = flawed_text
    teacher_finished: bool = True
    rows: int = 40
    steps: int = 25
    lr: float = 1e-3


def group(case: Case, index: int, rng: random.Random, samples: int) -> Group:
    messages = ({"role": "user", "content": f"Name a city. {index}"},)
    made = Group(Prompt(index, messages, TEMPLATE.prompt_ids(messages)),
                 response(case.teacher(rng), finished=case.teacher_finished))  # fmt: skip
    made.samples = [response(case.student(rng)) for _ in range(samples)]
    return made


def examined(case: Case, tmp_path, model: FromModel | None = None) -> dict[str, Finding]:
    rng = random.Random(3)
    train = [group(case, i, rng, 2) for i in range(case.rows)]
    held_out = [group(case, 1000 + i, rng, 3) for i in range(40)]
    d, metrics = discriminator(tmp_path, torch.float32), []
    with torch.no_grad():
        d.model.score.weight.mul_(0.05)
    for _ in range(case.steps):
        scores = d.score(rng.sample(train, min(8, len(train))), backward=True)
        d.step(case.lr)
        metrics.append({"discriminator/accuracy": scores.accuracy})
    _, rows = evaluate(held_out, d)
    evidence = Evidence.of({"after_gad": rows}, metrics[-5:], model)
    assert evidence is not None
    return {finding.check: finding for finding in examine(evidence)}


def wrong(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "wrong"}


def test_a_healthy_one(tmp_path) -> None:
    found = examined(Case(), tmp_path)
    assert wrong(found) == set()
    assert verdict(list(found.values())) == "Nothing that these checks see is wrong with the discriminator."
    assert all(not finding.mend for finding in found.values())
    assert "bag of words" in found["surface"].found and "of 40 held-out prompts" in found["accuracy"].found


def doubled(rng: random.Random) -> str:
    return " ".join(teacher_text(rng) for _ in range(rng.choice([1, 2, 3])))


@pytest.mark.parametrize(
    ("case", "check", "said", "mend"),
    [
        (
            Case(teacher_finished=False),
            "end marker",
            "0 % of the teacher's responses end by themselves, 100 % of the student's: D can tell",
            "raise data.max_response_tokens",
        ),
        (
            Case(student=lambda rng: f"assistant\n{teacher_text(rng)}"),
            "template",
            "0 % of the teacher's responses and 100 % of the student's hold what a chat template writes",
            "data.template_arguments",
        ),
        (Case(student=lambda rng: f"<think>a</think>{teacher_text(rng)}"), "template", "a block of reasoning",
         'data.reasoning = "strip"'),
        (Case(student=doubled), "length", "The student is paid for short responses", "algorithm.length_debias = fit"),
        (Case(student=lambda rng: "zero zero zero", steps=60), "saturation", "D has won",
         "discriminator.label_smoothing"),
        (Case(student=teacher_text, rows=4, steps=60), "memorised", "On its latest training batches D told 100 % apart",
         "knows its teacher's texts by heart"),
        (Case(student=teacher_text, steps=1), "accuracy", "no more than guessing: rewards are noise",
         "discriminator.lr"),
        (Case(student=lambda rng: teacher_text(rng).replace("The", "A"), steps=15), "surface",
         "no better than first word alone", "responses begin differently"),
    ],
)  # fmt: skip
def test_one_that_is_broken_on_purpose(case: Case, check: str, said: str, mend: str, tmp_path) -> None:
    found = examined(case, tmp_path)
    assert check in wrong(found)
    assert said in found[check].found and mend in found[check].mend
    assert check in verdict(list(found.values()))
    # One that has learned nothing yet has learned nothing by heart.
    assert ("memorised" in wrong(found)) == (check == "memorised")


def test_what_the_model_says(tmp_path) -> None:
    well = FromModel(identical=1e-5, end_marker=0.5, trained=1.0, held_out=0.75, noise=0.8)
    found = examined(Case(steps=2), tmp_path, well)
    assert [found[name].status for name in ("identical text", "reward noise")] == ["ok", "ok"]
    assert (
        "Teacher's texts that it was trained on score +0.2 standard deviations above others" in found["memorised"].found
    )
    assert "taking the marker off moves a score by 0.5 standard deviations" in found["end marker"].found
    ill = examined(Case(steps=2), tmp_path, FromModel(identical=0.3, end_marker=0.0, noise=0.1))
    assert {"identical text", "reward noise"} <= wrong(ill)


def test_rows_without_samples_or_scores_say_nothing() -> None:
    row = {"prompt": "p", "teacher": "t", "student": "s", "teacher_score": 1.0}
    assert Evidence.of({"before": [row]}, []) is None
    sample = {"text": "s", "finished": True}
    assert Evidence.of({"before": [row | {"samples": [sample]}]}, []) is None
    assert Evidence.of({"before": [row | {"samples": [sample | {"score": float("nan")}]}]}, []) is None
    known = [row | {"samples": [sample | {"score": 0.5}]}]
    evidence = Evidence.of({"before": known, "after_gad": [row]}, [])
    assert evidence is not None and evidence.evaluation == "before" and evidence.margins == [[0.5]]
    # Eight prompts are too few for baselines, and one is no evidence of anything.
    found = {finding.check: finding.status for finding in examine(evidence)}
    assert found["surface"] == "note" and found["accuracy"] == "wrong" and "length" not in found
