"""Trainer: a real one in a few lines, and what its schedule and its seeds depend on."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from gadcore.algorithm import STAGES, gad
from gadcore.config.curriculum import GateSettings
from gadcore.config.settings import AlgorithmSettings, Config, ScheduleSettings
from gadcore.data.batches import Loader
from gadcore.data.groups import Group
from gadcore.errors import UserError
from gadcore.models.discriminator import Discriminator
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from gadcore.rollout.engine import make_engine
from gadcore.rollout.sampler import Sampler, derived_seed
from gadcore.rollout.weights import PlainWeights
from gadcore.train.convergence import Convergence
from gadcore.train.gate import Gate
from gadcore.train.progress import Progress, stage_steps, stages_of
from gadcore.train.trainer import Trainer
from tests.support.builders import groups
from tests.support.rows import Rows
from tests.support.tiny import save_tiny


@pytest.mark.parametrize(
    ("schedule", "stages", "expected"),
    [
        ({}, ["warmup", "gad"], {"warmup": 7, "gad": 14}),
        ({"gad_steps": 5}, ["warmup", "gad"], {"warmup": 7, "gad": 5}),
        ({"gad_steps": 500}, ["warmup", "gad"], {"warmup": 7, "gad": 14}),
        ({"warmup_steps": 0, "gad_epochs": 0}, ["warmup", "gad"], {"warmup": 0, "gad": 0}),
        ({"warmup_epochs": 0, "warmup_steps": 9}, ["warmup"], {"warmup": 0}),
        ({"seqkd_epochs": 2, "gad_steps": 1}, ["seqkd"], {"seqkd": 14}),
        ({"sft_epochs": 2, "gad_steps": 1}, ["sft", "warmup", "gad"], {"sft": 14, "warmup": 7, "gad": 1}),
    ],
)
def test_steps_of_a_stage(schedule: dict[str, int], stages: list[str], expected: dict[str, int]) -> None:
    config = Config(schedule=ScheduleSettings(**schedule))
    steps = stage_steps(config, stages, steps_per_epoch=7)
    assert steps == expected and list(steps) == stages


@pytest.mark.parametrize(
    ("algorithm", "schedule", "wrong"),
    [
        ({"critic_warmup": 7}, {}, "algorithm.critic_warmup = 7 covers all 7 steps"),
        ({"critic_warmup": 6}, {}, ""),
        ({"critic_warmup": 3}, {"warmup_steps": 0}, ""),
        ({"student_warmup": False, "discriminator_warmup": False}, {}, "leave the warmup nothing to do"),
        ({"student_warmup": False, "discriminator_warmup": False}, {"warmup_epochs": 0}, ""),
        ({"freeze_discriminator": True}, {}, ""),
        ({"freeze_discriminator": True}, {"warmup_steps": 0}, "leaves it untrained"),
        ({"freeze_discriminator": True}, {"warmup_steps": 0, "gad_steps": 0}, ""),
        ({"freeze_discriminator": True, "discriminator_warmup": False}, {}, "leaves it untrained"),
    ],
)
def test_a_warmup_must_train_what_it_is_for(algorithm: dict, schedule: dict, wrong: str) -> None:
    config = Config(algorithm=AlgorithmSettings(**algorithm), schedule=ScheduleSettings(**schedule))
    if not wrong:
        assert stage_steps(config, ["warmup", "gad"], steps_per_epoch=7)
        return
    with pytest.raises(UserError, match=wrong):
        stage_steps(config, ["warmup", "gad"], steps_per_epoch=7)


def test_the_gate_needs_a_warmup_before_it() -> None:
    config = Config(gate=GateSettings(enabled=True), schedule=ScheduleSettings(warmup_steps=0))
    with pytest.raises(UserError, match="there is none: raise schedule.warmup_epochs"):
        stage_steps(config, ["warmup", "gad"], steps_per_epoch=7)
    assert stage_steps(config, ["seqkd"], steps_per_epoch=7) == {"seqkd": 21}


def test_progress_is_read_from_json_and_from_before_the_gate_existed() -> None:
    progress = Progress(step=9, gate=Gate(((3, 0.5), (5, 0.6)), 2), convergence=Convergence(((9, 0.7, 0.6, 0.8),)))
    state = json.loads(json.dumps(asdict(progress)))
    assert Progress.of(state) == progress
    for name in ("gate", "convergence", "lasted"):
        del state[name]
    assert Progress.of(state) == Progress(started=progress.started, step=9)


def test_a_seed_is_the_same_in_every_process() -> None:
    """A resumed run draws the same samples only while these values stay what they are."""
    assert derived_seed(0, "gad/1", 0) == 214570541580281
    assert derived_seed(7, "evaluation", 12) == 43433807096802


def test_a_seed_depends_on_every_argument() -> None:
    arguments = [(s, p, i) for s in (0, 1, 11) for p in ("gad/1", "gad/11", "warmup/1", "") for i in (0, 1, 10, 110)]
    seeds = [derived_seed(*each) for each in arguments]
    assert len(set(seeds)) == len(arguments)
    assert all(0 <= seed < 2**48 for seed in seeds)


def trainer(
    tmp_path, *, schedule: dict | None = None, curriculum: dict | None = None, eval_samples: int = 1, **algorithm
) -> Trainer:
    """A whole run of tiny models in memory: no folder, no stand-ins."""
    steps = {"batch_size": 2, "warmup_steps": 1, "gad_steps": 2, "activation_checkpointing": "off"}
    config = Config.model_validate(
        {
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 6, "eval_samples": eval_samples},
            "rollout": {"engine": "hf", "group_size": 3},
            "schedule": {**steps, **(schedule or {})},
            "algorithm": algorithm,
            "curriculum": curriculum or {},
            "checkpoint": {"every": 0},
        }
    )
    spec = ModelSpec.resolve(str(save_tiny(tmp_path)))
    student = Student.load(spec, config.student, config.algorithm, device="cpu")
    engine = make_engine(config, spec.path, student.model, spec.template)
    return Trainer(
        config,
        stages_of(config, "train"),
        student=student,
        discriminator=Discriminator.load(spec, student=spec, device="cpu"),
        sampler=Sampler(engine, PlainWeights(student.model), temperature=0.8, max_tokens=6),
        loader=Loader([Group(g.prompt, g.teacher) for g in groups(4)], 2, seed=0),
        held_out=groups(3, 0),
        records=Rows(),
    )


def test_a_trainer_without_a_folder_runs_every_stage(tmp_path) -> None:
    run = trainer(tmp_path)
    before = {name: p.clone() for name, p in run.student.model.named_parameters()}
    for stage in ("warmup", "gad"):
        STAGES[stage](run)
        run.end_stage(stage)
    run.evaluate("after")
    rows = run.records.rows
    assert [(row["stage"], row["step"], row["stage_step"]) for row in rows] == [
        ("warmup", 1, 1), ("gad", 2, 1), ("gad", 3, 2),
    ]  # fmt: skip
    assert all(row["discriminator/grad_norm"] > 0 and row["student/grad_norm"] > 0 for row in rows)
    assert "student/ce" in rows[0] and "student/kl" in rows[2]
    assert any(not torch.equal(p, before[name]) for name, p in run.student.model.named_parameters())
    assert run.progress.evaluations["after"]["rows"] == 3 and run.progress.lasted == {"warmup": 1, "gad": 2}
    with pytest.raises(RuntimeError, match="no folder to save into"):
        run.save()


def test_a_reward_of_ones_own_is_what_the_student_learns_from(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_rewards.py").write_text("def shortest(i):\n    return [-float(len(text)) for text in i.samples]\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = trainer(tmp_path / "model", reward="own_rewards:shortest")
    gad(run)
    for row in run.records.rows:
        assert row["reward/mean"] <= 0
        # Characters a sample: whole numbers, which D's scores are not.
        assert (6 * row["reward/mean"]) == pytest.approx(round(6 * row["reward/mean"]))


def test_a_pass_and_its_update_are_phases_of_their_own(tmp_path) -> None:
    run = trainer(tmp_path, discriminator_steps=2)
    entered: list[str] = []
    enter = run.memory.enter
    run.memory.enter = lambda state: (entered.append(state), enter(state))[1]  # type: ignore[method-assign]
    run.phases.memory = run.memory
    STAGES["warmup"](run)
    twice = ["discriminator", "discriminator_update"] * 2
    assert entered == [*twice, "student", "student_update"], "the sampler of this run has no states"
    entered.clear()
    STAGES["gad"](run)
    step = [*twice, "reference", "student", "student_update"]
    assert entered[-2 * len(step) :] == step * 2
    row = run.records.rows[-1]
    times = {name: row[f"time/{name}"] for name in ("reference", "student", "student_update")}
    assert all(seconds > 0 for seconds in times.values()) and row["time/total"] >= sum(times.values())
    rate = row["tokens/student"] / sum(times.values())
    assert row["perf/student_tokens_per_s"] == pytest.approx(rate), "the reference's pass is the student's work"


def test_records_are_told_of_every_phase_but_those_of_an_evaluation(tmp_path, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Rows, "phase", lambda _, name: told.append(name))
    monkeypatch.setattr(Rows, "status", lambda _, text: told.append(text))
    run = trainer(tmp_path, schedule={"gad_steps": 1})
    run.evaluate("before")
    assert told == ["evaluating on 3 held-out prompts", "evaluation"]
    told.clear()
    gad(run)
    learn = ["discriminator", "discriminator_update", "reference", "student", "student_update"]
    assert told == ["sampling 6 responses", *learn], "the sampler of this run has no phases"


def test_the_stages_of_a_command() -> None:
    for schedule in ({}, {"sft_epochs": 2, "sft_steps": 0}, {"sft_steps": 5}):
        assert stages_of(Config(schedule=ScheduleSettings(**schedule)), "train") == ("warmup", "gad")
    with_sft = Config(schedule=ScheduleSettings(sft_epochs=1))
    assert stages_of(with_sft, "train") == ("sft", "warmup", "gad")
    assert stages_of(with_sft, "seqkd") == ("seqkd",)


def test_sft_is_the_students_cross_entropy_and_nothing_else(tmp_path) -> None:
    """The student is that of seqkd at the warmup's learning rate; D and the sampler wait until it is done."""
    run, other = (trainer(tmp_path, schedule={"sft_epochs": 1, "sft_steps": 2}) for _ in range(2))
    untouched = {name: p.clone() for name, p in run.discriminator.model.named_parameters()}
    STAGES["sft"](run)
    for _ in range(2):
        other.student.seqkd_backward(next(other.loader))
        other.student.step(other.config.student.warmup_lr)
    theirs = dict(other.student.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in run.student.model.named_parameters())
    assert all(torch.equal(p, untouched[name]) for name, p in run.discriminator.model.named_parameters())
    assert [row["stage"] for row in run.records.rows] == ["sft", "sft"]
    assert not any(key.startswith(("discriminator/", "reward/", "tokens/sampled")) for key in run.records.rows[0])
    run.end_stage("sft")
    STAGES["warmup"](run)
    assert run.records.rows[-1]["stage"] == "warmup" and run.records.rows[-1]["step"] == 3


def test_an_evaluation_draws_as_many_samples_as_it_is_told(tmp_path) -> None:
    run = trainer(tmp_path, eval_samples=3)
    run.evaluate("before")
    figures = run.progress.evaluations["before"]
    assert (figures["rows"], figures["samples"]) == (3, 3)
    assert "accuracy" not in figures, "nothing has trained the discriminator's head yet"
    STAGES["warmup"](run)
    run.evaluate("after_warmup")
    assert 0 <= run.progress.evaluations["after_warmup"]["accuracy"] <= 1


def test_a_student_that_stood_still_is_not_sampled_again(tmp_path) -> None:
    drawn = []
    for student_warmup in (False, True):
        run = trainer(tmp_path, schedule={"sft_epochs": 1, "sft_steps": 1}, student_warmup=student_warmup)
        draw, purposes = run.sampler.draw, []
        run.sampler.draw = lambda g, n, why, draw=draw, p=purposes: (p.append(why), draw(g, n, why))  # type: ignore
        for stage in ("sft", "warmup"):
            STAGES[stage](run)
            run.evaluate(f"after_{stage}")
        drawn.append(purposes.count("evaluation"))
        sft, warmup = (run.progress.evaluations[f"after_{stage}"] for stage in ("sft", "warmup"))
        assert "accuracy" not in sft and "accuracy" in warmup
        assert (sft["style_checks"] == warmup["style_checks"]) or student_warmup
    assert drawn == [1, 2]
