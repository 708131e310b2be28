"""The benchmark of the whole step on a tiny model: every side runs in its process and agrees with fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import record, tables_step
from bench.suites import step

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
        for side, name in (("ours", "ours"), ("theirs", row["opponent"])):
            assert set(row[side]["phases_s"]) - {"other"} == PHASES[name]
            assert row[side]["response_tokens"] == [2 * 3 * 4]
            assert all(error > 0 for found, error in row["error"][name].items() if "loss" not in found)
        assert set(row["limit"]["share"]) == {"generate", "reference", "policy", "discriminator", "step"}
        assert all(0 < share < 1 for share in row["limit"]["share"].values())
    assert "### Beside literal" in tables_step.document(lambda suite: rows)


@pytest.mark.timeout(600)
def test_a_wrong_gradient_fails_the_gate(tmp_path: Path) -> None:
    """The gate reads what a process left: one changed reward or gradient is enough."""
    import torch

    from bench.step import gate
    from bench.step.problem import Problem

    bench = step._Bench(tmp_path, True, tmp_path, step.OPPONENTS)
    path = bench._problem(step.QUICK, check=True)
    findings = tmp_path / "findings"
    with step._Worker(step.LITERAL, path, 1, findings) as worker:
        worker.ask("check")
    found = torch.load(findings, weights_only=False)
    problem = Problem.read(path)
    assert step._within(gate.errors(problem, found))
    found["gradients"]["student"]["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-2
    assert not step._within(gate.errors(problem, found))


def test_a_process_that_ends_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)process of literal.*No such file"):
        step._Worker(step.LITERAL, tmp_path / "none.json", 1, tmp_path / "findings").__enter__()
