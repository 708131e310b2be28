"""The engine of docs/guide/extend.md samples a whole job, named by its file alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.runs import ROOT, records, run, tiny_arguments

SHORT = ["--schedule.warmup_steps", "1", "--schedule.gad_steps", "2", "--data.eval", "none"]
NAME = "greedy_engine:GreedyEngine"


def test_a_job_samples_with_the_guides_engine(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guide" / "extend.md").read_text()
    (program,) = re.findall(r"```python\n(# greedy_engine\.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "greedy_engine.py").write_text(program)
    assert f"--rollout.engine {NAME}" in page
    arguments = [*tiny_arguments(tmp_path, NAME), *SHORT, "--run.dir", "run"]
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = records(tmp_path / "run")
    # Greedy samples of a prompt are all the same: no group prefers one of them.
    assert [row["stage"] for row in rows] == ["warmup", "gad", "gad"]
    assert all(row["reward/std"] == pytest.approx(0, abs=1e-6) for row in rows)
    assert NAME in (tmp_path / "run" / "config.toml").read_text()
