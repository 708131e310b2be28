"""Inputs: models are looked for once a role, or once for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.config.loading import load
from gadcore.config.settings import Config
from gadcore.data.batches import Loader
from gadcore.errors import UserError
from gadcore.models import spec
from gadcore.train.inputs import describe_plan, read_inputs
from tests.support.runs import write_rows
from tests.support.tiny import save_tiny


@pytest.mark.parametrize(("other", "looked_for"), [(False, ["model"]), (True, ["model", "other"])])
def test_a_model_is_resolved_once_a_role(tmp_path, monkeypatch, other, looked_for) -> None:
    for name in ("model", "other"):
        save_tiny(tmp_path / name)
    seen, resolve = [], spec.resolve_model
    monkeypatch.setattr(spec, "resolve_model", lambda name: seen.append(name.rpartition("/")[2]) or resolve(name))
    config = Config.model_validate(
        {
            "data": {"train": str(write_rows(tmp_path / "rows.jsonl")), "eval": None}
            | {"max_prompt_tokens": 96, "max_response_tokens": 24},
            "student": {"model": str(tmp_path / "model")},
            "discriminator": {"model": str(tmp_path / "other") if other else "student"},
        }
    )
    inputs = read_inputs(config, ("warmup", "gad"))
    assert seen == looked_for
    assert (inputs.discriminator is inputs.student) == (not other)
    assert read_inputs(config, ("seqkd",)).discriminator is None and seen == [*looked_for, "model"]


def own_rows(folder: Path, count: int = 30, **settings: object) -> Config:
    """Settings of a run on `count` rows of one's own; each response is longer than the one before."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    rows = [{"prompt": f"Count to {i}.", "teacher_response": "1 2 3 " * (i + 1)} for i in range(count)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"data.train": folder / "mine.jsonl", "data.max_prompt_tokens": 96, "data.max_response_tokens": 150}
    values |= {"student.model": folder / "model", **settings}
    return load([f"--{key}={value}" for key, value in values.items()])


def test_held_out_rows_are_ones_own(tmp_path: Path) -> None:
    inputs = read_inputs(own_rows(tmp_path), ("warmup", "gad"))
    assert (len(inputs.train), len(inputs.held_out)) == (27, 3)
    asked = [group.prompt.messages[-1]["content"] for group in (*inputs.train, *inputs.held_out)]
    assert sorted(asked) == sorted(f"Count to {i}." for i in range(30))
    assert any("3 of the 30 rows of" in note and "data.eval_share = 0.1" in note for note in inputs.notes)
    capped = read_inputs(own_rows(tmp_path, **{"data.eval_rows": 2, "data.eval_share": 0.5}), ("warmup", "gad"))
    assert len(capped.held_out) == 2
    named = own_rows(tmp_path, **{"data.eval": tmp_path / "mine.jsonl", "data.eval_rows": 4})
    assert [len(rows) for rows in (read_inputs(named, ("seqkd",)).train, read_inputs(named, ("seqkd",)).held_out)] == [
        30,
        4,
    ]
    assert not read_inputs(own_rows(tmp_path, **{"data.eval": "none"}), ("seqkd",)).held_out


def test_a_column_map_is_of_ones_own_rows_alone(tmp_path: Path) -> None:
    config = own_rows(tmp_path, **{"data.columns": "prompt=prompt", "data.eval": "builtin", "data.eval_rows": 2})
    assert len(read_inputs(config, ("seqkd",)).held_out) == 2
    (tmp_path / "mine.jsonl").write_text('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}\n')
    mapped = ["--data.columns", "prompt=q,teacher_response=a"]
    config = load([*arguments(config), *mapped])
    assert len(read_inputs(config, ("seqkd",)).train) == 2
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    named = [*arguments(config), *mapped, "--data.eval", str(tmp_path / "other.jsonl")]
    with pytest.raises(UserError, match="other.jsonl:1: there is no column 'q'"):
        read_inputs(load(named), ("seqkd",))
    held_out = read_inputs(load([*named, "--data.eval_columns", "{}"]), ("seqkd",)).held_out
    assert [group.teacher.text for group in held_out] == ["b"]


def arguments(config: Config) -> list[str]:
    return [f"--{name}={value}" for name, value in (
        ("data.train", config.data.train), ("data.eval", config.data.eval), ("data.eval_rows", config.data.eval_rows),
        ("student.model", config.student.model), ("data.max_prompt_tokens", 96), ("data.max_response_tokens", 150),
    )]  # fmt: skip


@pytest.mark.parametrize(("limit", "warned"), [(20, True), (150, True), (260, False), (400, False)])
def test_much_lost_text_is_a_warning_with_the_limit_that_rows_need(tmp_path: Path, limit: int, warned: bool) -> None:
    config = own_rows(tmp_path, **{"data.max_response_tokens": limit})
    # The tiny model's context is too short for these limits: only the rows are of interest here.
    config_json = json.loads((tmp_path / "model" / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_json))
    inputs = read_inputs(config, ("seqkd",))
    facts = inputs.report.facts
    assert facts is not None and facts.response.over == inputs.report.cut_responses
    assert bool(inputs.warnings) == warned == (facts.response.over > 3)
    if warned:
        assert f"95 % of the rows need {facts.response.p95}, 99 % {facts.response.p99}" in inputs.warnings[0]
        within = read_inputs(own_rows(tmp_path, **{"data.max_response_tokens": facts.response.p95}), ("seqkd",))
        assert within.report.cut_responses <= 0.05 * 30 and not within.warnings


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "lines"),
    [
        (3, 256, (1, 1), ["warmup: 1 steps of 3 prompts, 24 samples", "gad: 1 steps of 3 prompts, 24 samples"]),
        (10, 4, (1, 2), ["warmup: 3 steps of 4 prompts (an epoch's last one: 2), 80 samples", "gad: 6 steps of 4 "
                         "prompts (an epoch's last one: 2), 160 samples"]),
        (8, 4, (1, 1), ["warmup: 2 steps of 4 prompts, 64 samples", "gad: 2 steps of 4 prompts, 64 samples"]),
    ],
)  # fmt: skip
def test_the_plan_counts_prompts_that_are_there(
    tmp_path: Path, rows: int, batch: int, epochs: tuple[int, int], lines: list[str]
) -> None:
    settings = {"data.eval": "none", "schedule.batch_size": batch, "rollout.group_size": 8}
    settings |= {"schedule.warmup_epochs": epochs[0], "schedule.gad_epochs": epochs[1]}
    settings |= {"schedule.warmup_steps": "none", "schedule.gad_steps": "none"}
    config = own_rows(tmp_path, rows, **settings)
    told = describe_plan(config, ("warmup", "gad"), read_inputs(config, ("warmup", "gad")))
    for line in lines:
        assert line in told


def test_samples_are_counted_where_a_limit_ends_a_stage_within_an_epoch(tmp_path: Path) -> None:
    settings = {"data.eval": "none", "schedule.batch_size": 4, "rollout.group_size": 2}
    settings |= {"schedule.warmup_steps": 2, "schedule.gad_steps": 2, "schedule.gad_epochs": 4}
    config = own_rows(tmp_path, 10, **settings)
    inputs = read_inputs(config, ("warmup", "gad"))
    told = describe_plan(config, ("warmup", "gad"), inputs)
    drawn = [len(next(batches)) * 2 for batches in [Loader(inputs.train, 4, 0)] for _ in range(4)]
    assert f"warmup: 2 steps of 4 prompts (an epoch's last one: 2), {sum(drawn[:2])} samples" in told
    assert f"gad: 2 steps of 4 prompts (an epoch's last one: 2), {sum(drawn[2:])} samples" in told


def test_a_broken_row_is_told_before_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = own_rows(tmp_path, **{"student.model": tmp_path / "absent"})
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match="mine.jsonl:31: broken JSON"):
        read_inputs(config, ("seqkd",))
