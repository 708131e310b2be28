"""A run of adapters on one base over two processes, from the command line to the export, beside the same run in one.

Samples are replayed, as in test_distributed.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gadcore.models.learner import ADAPTER
from gadcore.models.peft_format import WEIGHTS
from gadcore.run import main
from tests.runs.test_distributed import SCRIPT, arguments, assert_alike, finished
from tests.support.jobs import start_job
from tests.support.runs import assert_same_run, run
from tests.support.sharding import relative

ADAPTERS = "--student.adapter lora --student.adapter_rank 4 --discriminator.adapter lora --discriminator.adapter_rank 8"


def replayed(folder: Path, size: int, name: str, *others: str) -> str:
    command = [SCRIPT, "replay", str(folder / "samples.json"), "--", *own(folder, name), *others]
    return finished(start_job(size, command, folder / f"out-{name}", cwd=folder))


def own(folder: Path, name: str) -> list[str]:
    return [*arguments(folder, *ADAPTERS.split(), "--checkpoint.keep", "4"), "--run.dir", name]


@pytest.fixture(scope="module")
def two(module_folder: Path) -> Path:
    """The run of one process, which draws the samples, and the same over two."""
    command = [sys.executable, SCRIPT, "record", str(module_folder / "samples.json"), "--"]
    done = run(own(module_folder, "one"), module_folder, command=command)
    assert done.returncode == 0, done.stderr
    replayed(module_folder, 2, "two")
    return module_folder


def back(folder: Path, name: str) -> None:
    """A copy of the run of two, to go on from its fourth step with."""
    shutil.copytree(folder / "two", folder / name)
    (folder / name / "summary.json").unlink()


def test_two_processes_train_the_adapters_that_one_does(two) -> None:
    assert_alike(two / "two", two / "one", rel=1e-5)
    for owner in ("student", "discriminator"):
        ours, theirs = (load_file(two / name / owner / ADAPTER / WEIGHTS) for name in ("two", "one"))
        print(owner, relative(ours, theirs))
        assert relative(ours, theirs) < 1e-4
    assert json.loads((two / "two/summary.json").read_text())["distributed"]["processes"] == 2


def test_they_go_on_to_the_bit(two) -> None:
    """Inside the GAD stage: the reference is one of what comes back."""
    back(two, "again")
    job = [SCRIPT, "replay", str(two / "samples.json"), "--", "--run.dir", "again", "--resume", "step-000004"]
    finished(start_job(2, job, two / "out-again", cwd=two))
    assert_same_run(two / "again", two / "two")


def test_one_process_goes_on_where_two_stood(two) -> None:
    back(two, "moved")
    command = [sys.executable, SCRIPT, "replay", str(two / "samples.json"), "--"]
    done = run(["--run.dir", "moved", "--resume", "step-000004"], two, command=command)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is one of 2 processes, the run goes on with 1 process" in done.stdout
    assert_alike(two / "moved", two / "one", rel=1e-5)


def test_a_checkpoint_holds_every_tensor_once_and_is_exported_as_it_was_saved(two, tmp_path) -> None:
    newest = max((two / "two/checkpoints").glob("step-*"))
    names = [name for file in newest.glob("student-0*.safetensors") for name in load_file(file)]
    assert len(names) == len(set(names)) and all("lora_" in name for name in names)
    assert main(["export", str(two / "two"), "--out", str(tmp_path / "out")]) == 0
    for file in ("model.safetensors", f"{ADAPTER}/{WEIGHTS}"):
        ours, theirs = (load_file(place / file) for place in (tmp_path / "out", two / "two/student"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.by_hand
def test_two_processes_go_on_where_one_stood(two) -> None:
    shutil.copytree(two / "one", two / "spread")
    (two / "spread/summary.json").unlink()
    job = [SCRIPT, "replay", str(two / "samples.json"), "--", "--run.dir", "spread", "--resume", "step-000004"]
    text = finished(start_job(2, job, two / "out-spread", cwd=two))
    assert "the checkpoint is one of 1 process, the run goes on with 2 processes" in text
    assert_alike(two / "spread", two / "one", rel=1e-5)
