"""Every file of examples/ as its first line says that it is used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, records, run, tiny_arguments

EXAMPLES = ROOT / "examples"
SHORT = ["--schedule.warmup_steps", "1", "--schedule.gad_steps", "2", "--data.eval", "none", "--checkpoint.every", "1"]


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 6 and max(lengths.values()) <= 40


@pytest.mark.parametrize(("name", "setting"), [("my_loss", "algorithm.loss"), ("my_reward", "algorithm.reward")])
def test_a_function_of_ones_own(name: str, setting: str, tmp_path: Path) -> None:
    (function,) = re.findall(rf"--{setting} (\S+)", (EXAMPLES / f"{name}.py").read_text())
    (tmp_path / "examples").symlink_to(EXAMPLES)
    done = run([*tiny_arguments(tmp_path), *SHORT, f"--{setting}", function, "--run.dir", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(row["student/grad_norm"] > 0 for row in records(tmp_path / "run"))
    assert function in (tmp_path / "run" / "config.toml").read_text()


def test_a_stage_of_ones_own_has_settings_metrics_and_resume(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "my_stage.py")]
    arguments = [*tiny_arguments(tmp_path), *SHORT, "--checkpoint.keep", "9", "--run.dir", "run"]
    done = run(arguments, tmp_path, command=command)
    assert done.returncode == 0, done.stderr
    rows = records(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["warmup", "gad", "gad"]
    for row in rows[1:]:
        assert ("discriminator/grad_norm" in row) == (row["discriminator/accuracy"] < 0.9)
    back = run([*arguments, "--resume", "step-000002"], tmp_path, command=command)
    assert back.returncode == 0, back.stderr
    assert [row["stage"] for row in records(tmp_path / "run")] == ["warmup", "gad", "gad"]


def test_the_kernels_alone(tmp_path: Path) -> None:
    done = run([], tmp_path, command=[sys.executable, str(EXAMPLES / "kernels_alone.py")])
    assert done.returncode == 0, done.stderr
    loss, written_out = map(float, re.findall(r"loss (\S+) written out (\S+)", done.stdout)[0])
    (gap,) = re.findall(r"differ by (\S+)", done.stdout)
    assert loss == pytest.approx(written_out, rel=1e-12) and float(gap) < 1e-12
