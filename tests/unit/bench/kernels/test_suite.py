"""The suite `kernels` from the command line, on small shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record
from bench.kernels import tables
from bench.record import Result
from gadcore.kernels.cpu import native


def test_quick_suite_from_the_command_line(tmp_path: Path) -> None:
    reason = native.why_missing("cpu_linear_grpo_loss")
    if reason is not None:
        pytest.skip(reason)
    out = tmp_path / "kernels.json"
    call = [sys.executable, "-m", "bench", "kernels", "--quick", "--out", str(out)]
    done = subprocess.run(call, cwd=record.ROOT, capture_output=True, text=True, env=os.environ, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [Result.from_json(row) for row in record.read(out)]
    ops = {"linear_grpo_loss", "linear_logprob", "bt_score", "grpo_ratio_loss", "linear_few_rows"}
    assert {r.op for r in results} == ops
    assert {(r.suite, r.impl, r.threads, r.gate) for r in results} == {("kernels", "cpu", 1, "pass")}
    text = tables.document(lambda suite: record.read(out) if suite == "kernels" else [])
    assert all(f"### {op}" in text for op in ops - {"linear_few_rows"})
