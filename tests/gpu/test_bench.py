"""The staged benchmark and the doctor on a GPU: small sizes, every stage in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gadcore.config.driver import read_driver
from tests.support.runs import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.timeout(1200)
def test_every_stage_with_small_sizes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench", "gpu", "--quick", "--out", str(out), "--minutes", "18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = json.loads(out.read_text())
    failed = [f"{row['stage']}: {row.get('case')}: {row.get('error')}" for row in rows if row.get("gate") == "fail"]
    assert done.returncode == 0 and not failed, "\n".join(failed) + done.stderr[-4000:]


def test_the_driver_has_the_gpus_that_torch_sees() -> None:
    driver = read_driver()
    assert driver is not None and torch.version.cuda is not None and driver.runs(torch.version.cuda)
    properties = torch.cuda.get_device_properties(0)
    same = [gpu for gpu in driver.gpus if gpu.name == properties.name]
    assert same and same[0].capability == (properties.major, properties.minor)
    assert same[0].memory == pytest.approx(properties.total_memory, rel=0.05)


def test_the_doctor_finds_nothing_wrong() -> None:
    command = [sys.executable, "-m", "gadcore.run", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 0, [check for check in checks if check["status"] == "wrong"]
