"""GAD in TRL on the bundled model and the rows that come with gadcore: killed, resumed, equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import ROOT

MODEL = "smollm2-135m-instruct"
STATE = "discriminator-state.safetensors"


def start(folder: Path, *resume: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.trl_program", MODEL, str(folder), *resume]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True)


@pytest.mark.by_hand
@pytest.mark.timeout(3600)
def test_three_steps_killed_after_the_second_are_those_of_a_run_that_was_not(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait() == 0
    running = start(cut)
    while not (cut / "checkpoint-2" / STATE).exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (cut / "log.json").exists()
    assert start(cut, "resume").wait() == 0

    logs = [json.loads((folder / "log.json").read_text()) for folder in (whole, cut)]
    print(json.dumps(logs[0], indent=1))
    assert logs[0] == logs[1]
    for step in logs[0]:
        assert step["discriminator/grad_norm"] > 0 and step["grad_norm"] > 0
    for file in (STATE, "model.safetensors"):
        one, other = (load_file(folder / "checkpoint-3" / file) for folder in (whole, cut))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file
