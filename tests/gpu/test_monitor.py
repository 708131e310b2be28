"""What only a GPU can prove of the monitor: that NVML's figures are those of torch's device, and move with its work."""

from __future__ import annotations

import time

import pytest
import torch

from gadcore.record.monitor import GPU_ENERGY, MachineMonitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GIB = 2**30


@pytest.fixture
def monitor():
    pytest.importorskip("pynvml")
    told: list[str] = []
    made = MachineMonitor(torch.device("cuda"), 0.1, told.append)
    yield made, told
    made.close()


def test_memory_is_that_of_the_same_device(monitor) -> None:
    machine, _ = monitor
    block = torch.ones(GIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    time.sleep(0.3)
    seen = machine.take_step()["machine/gpu_memory_used_gib"]
    free, total = torch.cuda.mem_get_info()
    # NVML counts what the driver keeps for itself as well.
    assert (total - free) / GIB == pytest.approx(seen, abs=1.0) and seen >= block.nbytes / GIB


def test_work_is_seen_in_utilisation_power_and_energy(monitor) -> None:
    machine, told = monitor
    time.sleep(1.0)
    idle = machine.take_step()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + 2.0
    while time.perf_counter() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
    busy = machine.take_step(sampled_tokens=1000)
    assert busy["machine/gpu_util"] > 0.5 > idle["machine/gpu_util"]
    assert busy["machine/gpu_power_w"] > idle["machine/gpu_power_w"]
    assert busy[GPU_ENERGY] == pytest.approx(2.0 * busy["machine/gpu_power_w"], rel=0.5)
    assert busy["energy/j_per_sampled_token"] >= busy[GPU_ENERGY] / 1000
    assert busy["machine/gpu_sm_clock_mhz"] > 0 and 0 <= busy["machine/gpu_throttled_share"] <= 1
    assert not [message for message in told if "cannot be read" in message]
