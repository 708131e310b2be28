"""The benchmark of the whole step on a tiny model: every side runs in its process and agrees with fp64."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record
from bench.step import comparison, gate, process, suite, tables
from bench.step.literal import Literal, advantages, load_discriminator, load_student
from bench.step.problem import Problem
from bench.step.worker import EPSILON, Clock, gradients_of

pytest.importorskip("vllm")
pytest.importorskip("trl")

PHASES = {
    "ours": {"weight update", "generate", "discriminator", "reference", "policy", "optimizer"},
    "TRL": {"generate", "discriminator score", "discriminator train", "reference", "policy", "optimizer"},
    "literal": {
        *("weight update", "generate", "old log-probs", "reference", "policy", "optimizer"),
        *("discriminator score", "discriminator train"),
    },
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "step.json"
    call = [sys.executable, "-m", "bench", "step", "--quick", "--out", str(out)]
    done = subprocess.run(call, cwd=record.ROOT, capture_output=True, text=True, env=os.environ, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return record.read(out)


@pytest.mark.timeout(600)
def test_all_sides_agree_with_fp64_and_are_timed_by_phase(rows: list[dict[str, Any]]) -> None:
    assert [(r["opponent"], r["threads"], r["gate"]) for r in rows] == [("TRL", 1, "pass"), ("literal", 1, "pass")]
    for row in rows:
        assert set(row["error"]) == {"ours", "schedule alone", row["opponent"]}
        alone = row["schedule_alone"]
        assert set(alone["ours"]["phases_s"]) - {"other"} == PHASES["ours"]
        assert alone["theirs"] == row["theirs"] and alone["ours"]["median_s"] != row["ours"]["median_s"]
        assert alone["ratio"] == pytest.approx(alone["theirs"]["median_s"] / alone["ours"]["median_s"])
        for side, name in (("ours", "ours"), ("theirs", row["opponent"])):
            assert set(row[side]["phases_s"]) - {"other"} == PHASES[name]
            assert row[side]["response_tokens"] == [2 * 3 * 4]
            assert all(error > 0 for found, error in row["error"][name].items() if "loss" not in found)
        assert set(row["limit"]["share"]) == {"generate", "reference", "policy", "discriminator", "step"}
        assert all(0 < share < 1 for share in row["limit"]["share"].values())
        names = [name for name, _, _ in row["profile"]["operations"]]
        # Which library multiplies depends on the CPU.
        assert {"aten::mm", "mkldnn::_linear_pointwise"} & set(names) and names[-1] == "other operations"
        assert 0 < sum(seconds for _, seconds, _ in row["profile"]["operations"]) <= row["profile"]["seconds"]
    text = tables.document(lambda suite: rows)
    assert "### Beside literal" in text and text.count("| schedule alone |") >= len(rows)


@pytest.mark.parametrize(("side", "native"), [(process.OURS, True), (process.ALONE, False)])
def test_the_schedule_alone_runs_without_native_ops(side: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GADCORE_NO_NATIVE", "0" if side == process.ALONE else "1")
    told = (
        "import json\nfrom gadcore import cpu\nfrom gadcore.kernels.cpu import native\n"
        "print(json.dumps([cpu.enabled(), native.why_missing('cpu_linear_grpo_loss')]))"
    )
    environment = process.environment(1, native=process.native(side))
    done = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    enabled, missing = json.loads(done.stdout)
    assert enabled is native and (missing == "GADCORE_NO_NATIVE=1 is set") is not native


def literal_findings(problem: Problem) -> dict[str, Any]:
    """What a process of the literal schedule leaves, in fp32 and on random samples."""
    student, discriminator = load_student(problem, torch.float32), load_discriminator(problem, torch.float32)
    reference = load_student(problem, torch.float32)
    sizes: dict[str, Any] = dict(temperature=problem.temperature, rows_at_once=2, pad_id=1)
    passes = Literal(student, reference, discriminator, problem.algorithm, Clock(), **sizes)
    rng = random.Random(0)
    samples = [
        [tuple(rng.choices(range(5, 320), k=1 + i)) for i in range(problem.samples)] for _ in range(problem.prompts)
    ]
    groups = problem.batch(0)
    rows = [(g.prompt.token_ids, y) for g, drawn in zip(groups, samples, strict=True) for y in drawn]
    teachers = [(g.prompt.token_ids, g.teacher.token_ids) for g in groups for _ in range(problem.samples)]
    rewards = passes.rewards(rows).view(len(groups), -1)
    return {
        "groups": [
            {"prompt": x, "samples": drawn, "d_prompt": x, "d_responses": [g.teacher.token_ids, *drawn]}
            for g, drawn in zip(groups, samples, strict=True)
            for x in [g.prompt.token_ids]
        ],
        "rewards": rewards.tolist(),
        "losses": {
            "policy": passes.policy_backward(rows, advantages(rewards).flatten()),
            "discriminator": passes.discriminator_backward(list(zip(teachers, rows, strict=True))),
        },
        "gradients": {"student": gradients_of(student), "discriminator": gradients_of(discriminator)},
        "epsilon": EPSILON,
    }


def test_a_wrong_reward_loss_or_gradient_fails_the_gate(tmp_path: Path) -> None:
    measurement = suite.Measurement(tmp_path, True, tmp_path, suite.OPPONENTS)
    problem = Problem.read(measurement.problem(suite.QUICK, check=True))
    found = literal_findings(problem)
    assert comparison.within(gate.errors(problem, found))
    for spoil in (
        lambda f: f["rewards"][1].__setitem__(2, f["rewards"][1][2] + 1e-3),
        lambda f: f["losses"].update(policy=f["losses"]["policy"] + 1e-4),
        lambda f: f["gradients"]["student"]["model.layers.0.mlp.up_proj.weight"].mul_(1.01),
        lambda f: f["gradients"]["discriminator"]["score.weight"].mul_(1.01),
    ):
        wrong = copy.deepcopy(found)
        spoil(wrong)
        assert not comparison.within(gate.errors(problem, wrong))
    # Another sample than the one that the gradient is of.
    wrong = copy.deepcopy(found)
    wrong["groups"][0]["samples"][1] = (7, 9)
    assert not comparison.within(gate.errors(problem, wrong))


def test_a_process_that_ends_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)process of literal.*No such file"):
        process.Worker(process.LITERAL, tmp_path / "none.json", 1, tmp_path / "findings").__enter__()
