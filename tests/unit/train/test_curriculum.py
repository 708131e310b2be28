"""The curriculum as a state machine over held-out figures, and in a run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from gadcore.algorithm import STAGES
from gadcore.config.curriculum import CurriculumSettings
from gadcore.models.student import Student
from gadcore.record.health import warnings
from gadcore.train.curriculum import Curriculum
from gadcore.train.progress import Progress
from tests.unit.train.test_trainer import trainer

BOTH = CurriculumSettings(every=5, end_sft=True, end_warmup=True, patience=2, tolerance=0.01)


def walk(stage: str, values: list[float], settings: CurriculumSettings = BOTH) -> Curriculum:
    state = Curriculum()
    for i, value in enumerate(values, 1):
        if stage != "sft":
            state = state.after(0.8).after(0.9)
        state = state.look(stage, 100 + 5 * i, 5 * i, value, settings)
    return state


@pytest.mark.parametrize(
    ("stage", "values", "end"),
    [
        ("sft", [2.0, 1.9, 1.8], None),
        ("sft", [2.0, 1.9, 1.895, 1.892], 20),
        ("sft", [2.0, 1.9, 1.95], None),  # of two looks without a new best there is one
        ("sft", [2.0, 1.9, 1.95, 1.99], 20),
        ("warmup", [0.5, 0.6, 0.7], None),
        ("warmup", [0.5, 0.7, 0.69, 0.705], 20),
        ("warmup", [0.7, 0.6, 0.5], 15),
        ("gad", [0.7, 0.6, 0.5, 0.5], None),  # ends by other rules
    ],
)
def test_where_a_stage_ends(stage: str, values: list[float], end: int | None) -> None:
    assert walk(stage, values).ends == ({} if end is None else {stage: end})
    assert walk(stage, values, CurriculumSettings(every=5)).ends == {}


def test_a_stage_counts_its_own_looks_alone() -> None:
    state = walk("sft", [2.0, 1.9])
    for i in (1, 2):
        state = state.after(0.9).look("warmup", 120 + i, i, 0.7, BOTH)
    assert state.ends == {}
    assert state.after(0.9).look("warmup", 123, 3, 0.7, BOTH).ends == {"warmup": 3}


def test_the_accuracy_in_training_is_that_since_the_look_before() -> None:
    state = Curriculum().after(0.5).after(0.7).look("warmup", 2, 2, 0.6, BOTH).after(None).after(1.0)
    assert state.looks[0].metrics == {"heldout/accuracy": 0.6, "heldout/train_accuracy": pytest.approx(0.6)}
    assert state.look("gad", 3, 1, 0.5, BOTH).looks[1].trained == 1.0
    assert walk("sft", [2.0]).looks[0].metrics == {"heldout/ce": 2.0}


def test_what_is_said() -> None:
    assert walk("sft", [2.0]).message() == "Curriculum: held-out cross-entropy 2.000 after step 105."
    assert walk("sft", [2.0, 2.0, 2.0]).message().endswith("115: it no longer falls, the cross-entropy ends.")
    state = walk("warmup", [0.7, 0.6, 0.5])
    assert state.message() == (
        "Curriculum: held-out accuracy of the discriminator 0.500 after step 115, 0.850 on what it was trained on: it "
        "no longer rises, the warmup ends."
    )
    assert state.told() == [
        "Held-out accuracy of the discriminator in the stage warmup (in brackets on what it was trained on): 0.700 "
        "(0.850), 0.600 (0.850), 0.500 (0.850); its plateau ended the stage after step 15."
    ]


def test_progress_is_read_from_json_and_from_before_there_was_a_curriculum() -> None:
    progress = Progress(step=9, curriculum=walk("warmup", [0.7, 0.6, 0.5]).after(0.25))
    state = json.loads(json.dumps(asdict(progress)))
    assert Progress.of(state) == progress
    del state["curriculum"]
    assert Progress.of(state) == Progress(started=progress.started, step=9)


def test_a_discriminator_that_learns_by_heart_is_told() -> None:
    def told(train: float, held_out: float) -> list[str]:
        rows = [{"stage": "warmup", "step": 4, "heldout/train_accuracy": train, "heldout/accuracy": held_out}]
        return [warning.text for warning in warnings(rows)]

    (text,) = told(0.9, 0.7)
    assert "90 %" in text and "70 %" in text and "discriminator.label_smoothing" in text
    assert told(0.8, 0.7) == told(0.6, 0.9) == []


def test_the_held_out_cross_entropy_is_what_the_stage_minimises(tmp_path) -> None:
    run = trainer(tmp_path)
    groups = run.heldout.groups
    expected = run.student.seqkd_backward(groups).ce
    run.student.discard()
    assert run.heldout.cross_entropy(run.student, rows=len(groups)) == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in run.student.model.parameters())
    assert run.heldout.cross_entropy(run.student, rows=1) != pytest.approx(expected, rel=1e-6)


def test_a_run_ends_its_stages_at_their_plateaus(tmp_path, monkeypatch) -> None:
    schedule = {"sft_epochs": 4, "warmup_steps": None, "warmup_epochs": 4, "gad_steps": 2}
    run = trainer(tmp_path, schedule=schedule, curriculum={"every": 1, "end_sft": True, "end_warmup": True})
    monkeypatch.setattr(Student, "cross_entropy", lambda self, groups: 1.0)
    monkeypatch.setattr(run.heldout, "accuracy", lambda rows: 0.75)
    for stage in ("sft", "warmup", "gad"):
        STAGES[stage](run)
        run.end_stage(stage)
    assert run.progress.lasted == {"sft": 3, "warmup": 3, "gad": 2}
    rows = run.records.rows
    assert [row.get("heldout/ce") for row in rows] == [1.0] * 3 + [None] * 5
    assert [row.get("heldout/accuracy") for row in rows] == [None] * 3 + [0.75] * 5
    assert all(row["heldout/train_accuracy"] == row["discriminator/accuracy"] for row in rows[3:])
    assert run.summary()["curriculum"]["ends"] == {"sft": 3, "warmup": 3}


def test_looks_change_nothing_else(tmp_path) -> None:
    """Neither the weights nor any figure of the steps."""
    runs = [trainer(tmp_path, schedule={"sft_epochs": 1}, curriculum={"every": every}) for every in (0, 1)]
    for run in runs:
        for stage in ("sft", "warmup", "gad"):
            STAGES[stage](run)
    plain, looked = (dict(run.student.model.named_parameters()) for run in runs)
    assert all(torch.equal(p, looked[name]) for name, p in plain.items())
    kept = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "memory/", "heldout/"))} for row in r]
        for r in (run.records.rows for run in runs)
    ]
    assert kept[0] == kept[1]
