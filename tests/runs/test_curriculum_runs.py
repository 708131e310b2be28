"""Stages that end on held-out figures, in whole runs: killed and resumed they are the same to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import assert_same_run, records, run, tiny_arguments

# A tolerance of 10 makes a plateau of any two looks.
SETTINGS = [
    *(
        "--curriculum.every",
        "1",
        "--curriculum.rows",
        "4",
        "--curriculum.patience",
        "1",
        "--curriculum.tolerance",
        "10",
    ),
    *("--curriculum.end_sft", "true", "--curriculum.end_warmup", "true", "--schedule.sft_epochs", "3"),
    *("--schedule.gad_steps", "2", "--checkpoint.every", "1", "--tracking.monitor_interval", "0"),
]
KILLED = """
import os, signal, sys
from gadcore.run import main
from gadcore.train.trainer import Trainer

record, stop_at = Trainer.record, int(sys.argv.pop(1))

def killed(self, result):
    record(self, result)
    if self.progress.step == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)

Trainer.record = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(module_folder: Path) -> Path:
    done = run([*tiny_arguments(module_folder), *SETTINGS, "--run.dir", "whole"], module_folder)
    assert done.returncode == 0, done.stderr
    assert "it no longer falls, the cross-entropy ends" in done.stdout
    assert "it no longer rises, the warmup ends" in done.stdout
    # The report's first sentences stand at the end of the log.
    *_, by_gad, held_out, report, following = done.stdout.splitlines()
    assert "GAD made " in by_gad and held_out.startswith("Held-out ")
    assert report == "report: whole/report.html"
    assert following == "next: gadcore chat whole, or gadcore serve whole"
    return module_folder


def test_stages_end_at_their_plateaus(whole: Path) -> None:
    summary = json.loads((whole / "whole/summary.json").read_text())
    assert summary["steps"] == {"sft": 2, "warmup": 2, "gad": 2}
    assert summary["curriculum"]["ends"] == {"sft": 2, "warmup": 2}
    rows = records(whole / "whole")
    assert ["heldout/ce" in row for row in rows] == [True] * 2 + [False] * 4
    assert ["heldout/accuracy" in row for row in rows] == [False] * 2 + [True] * 4
    page = (whole / "whole/report.html").read_text()
    assert "its plateau ended the stage after step 2" in page and "Discriminator accuracy" in page


# Inside the stage that a look is to end, and where one was ended before.
@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.by_hand) for step in (1, 2, 4, 5))])
def test_a_killed_run_ends_its_stages_where_the_whole_one_does(whole: Path, tmp_path: Path, step: int) -> None:
    script, to = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    arguments = [*tiny_arguments(whole), *SETTINGS, "--run.dir", str(to)]
    done = run(arguments, whole, command=[sys.executable, str(script), str(step)])
    assert done.returncode == -9, done.stderr
    done = run(["--run.dir", str(to), "--resume", "auto"], whole)
    assert done.returncode == 0, done.stderr
    assert_same_run(to, whole / "whole")
