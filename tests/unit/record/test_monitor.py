"""The monitor of the machine: its figures, and that nothing of it can end a run."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gadcore.errors import UserError
from gadcore.record.monitor import MachineMonitor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UUID = "5f2a1c3e-0000-1111-2222-333344445555"
NEVER = 3600.0
GPU_FIGURES = {"gpu_util", "gpu_memory_used_gib", "gpu_power_w", "gpu_sm_clock_mhz", "gpu_throttled_share",
               "gpu_energy_j"}  # fmt: skip


class FakeNvml(ModuleType):
    """Two GPUs behind NVML's functions. figures: of the one that torch uses. broken: functions that fail."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.name = f"GPU-{UUID}"
        self.figures = {"util": 50, "used": 3 * 2**30, "power": 400_000, "clock": 1980, "reasons": 0, "energy": 0}
        self.broken: set[str] = set()
        self.open = 0

    def nvmlInit(self) -> None:
        if "nvmlInit" in self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.name:
            raise self.NVMLError_NotFound("Not Found")
        return uuid

    def _of(self, function: str, handle: str, key: str) -> int:
        assert handle == self.name
        if function in self.broken:
            raise self.NVMLError("Not Supported")
        return self.figures[key]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self._of("nvmlDeviceGetUtilizationRates", handle, "util"), memory=99)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        used = self._of("nvmlDeviceGetMemoryInfo", handle, "used")
        return SimpleNamespace(total=80 * 2**30, free=80 * 2**30 - used, used=used)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._of("nvmlDeviceGetPowerUsage", handle, "power")

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return self._of("nvmlDeviceGetClockInfo", handle, "clock")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._of("nvmlDeviceGetCurrentClocksThrottleReasons", handle, "reasons")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._of("nvmlDeviceGetTotalEnergyConsumption", handle, "energy")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return fake


Make = Callable[..., MachineMonitor]


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def make(messages: list[str], tmp_path: Path) -> Iterator[Make]:
    """Monitors that see no RAPL counters of the machine of the test and are closed after it."""
    made: list[MachineMonitor] = []

    def monitor(device: torch.device = CPU, interval: float = NEVER, **more: Any) -> MachineMonitor:
        made.append(MachineMonitor(device, interval, messages.append, **{"rapl": tmp_path / "none"} | more))
        return made[-1]

    yield monitor
    for monitor_made in made:
        monitor_made.close()


def domain(root: Path, folder: str, name: str, energy: int, limit: int = 1_000_000_000) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", limit)):
        (path / file).write_text(f"{content}\n")
    return path


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def test_on_a_cpu(make: Make, messages: list[str]) -> None:
    pages = 3000
    block = mmap.mmap(-1, pages * mmap.PAGESIZE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        block.madvise(mmap.MADV_NOHUGEPAGE)
    first = clocks()
    monitor = make()
    second = clocks()
    for page in range(pages):
        block[page * mmap.PAGESIZE] = 1
    while time.process_time() - second[0] < 0.2:
        pass
    third = clocks()
    values = monitor.take_step(100)
    last = clocks()
    assert values.keys() == {"machine/cpu_load", "machine/rss_gib", "machine/major_faults", "machine/minor_faults"}
    # Whatever else the machine does: the step lies inside the outer two clocks and around the inner two.
    least, most = (third[0] - second[0]) / (last[1] - first[1]), (last[0] - first[0]) / (third[1] - second[1])
    assert least <= values["machine/cpu_load"] <= most
    assert values["machine/minor_faults"] >= pages
    # The next step starts anew.
    assert monitor.take_step()["machine/minor_faults"] < pages
    assert messages == []


def test_rss_is_that_of_this_process(make: Make) -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) / 2**20
    assert make().take_step()["machine/rss_gib"] == pytest.approx(resident, rel=0.1)


def test_on_a_gpu(make: Make, nvml: FakeNvml, messages: list[str]) -> None:
    monitor = make(CUDA)
    looks = [(20, 3 * 2**30, 300_000, 1980), (40, 9 * 2**30, 600_000, 1800), (90, 6 * 2**30, 300_000, 1710)]
    for util, used, power, clock in looks:
        nvml.figures |= {"util": util, "used": used, "power": power, "clock": clock}
        monitor._look()
    nvml.figures["energy"] = 2_500_000
    values = monitor.take_step(50)
    assert {name for name in values if "gpu" in name} == {f"machine/{name}" for name in GPU_FIGURES}
    assert values["machine/gpu_util"] == pytest.approx(0.5)
    assert values["machine/gpu_memory_used_gib"] == 9
    assert values["machine/gpu_power_w"] == pytest.approx(400)
    assert values["machine/gpu_sm_clock_mhz"] == pytest.approx(1830)
    assert values["machine/gpu_energy_j"] == 2500
    assert values["energy/j_per_sampled_token"] == 50
    assert values["machine/gpu_throttled_share"] == 0
    # A step with nothing sampled, and shorter than the interval: one look, at its end.
    nvml.figures |= {"util": 30, "energy": 2_600_000}
    short = monitor.take_step(0)
    assert (short["machine/gpu_util"], short["machine/gpu_energy_j"]) == (0.3, 100)
    assert "energy/j_per_sampled_token" not in short
    assert messages == []


def test_what_lies_between_two_steps_is_in_neither(make: Make, nvml: FakeNvml) -> None:
    monitor = make(CUDA)
    nvml.figures |= {"util": 100, "energy": 9_000_000}
    monitor._look()
    monitor.begin_step()
    nvml.figures |= {"util": 10, "energy": 9_001_000}
    values = monitor.take_step()
    assert (values["machine/gpu_util"], values["machine/gpu_energy_j"]) == (0.1, 1)


def test_slow_clocks_are_counted_and_every_reason_is_reported_once(
    make: Make, nvml: FakeNvml, messages: list[str]
) -> None:
    monitor = make(CUDA)
    # Idle, and clocks set by hand: nothing is wrong.
    for reasons in (0x01, 0x02, 0x04 | 0x01, 0x04 | 0x40):
        nvml.figures["reasons"] = reasons
        monitor._look()
    assert monitor.take_step()["machine/gpu_throttled_share"] == 0.5
    assert monitor.take_step()["machine/gpu_throttled_share"] == 1
    assert [message.split(": ")[1].split()[0] for message in messages] == ["SwPowerCap", "HwThermalSlowdown"]


def test_a_figure_that_fails_is_told_once_and_left_out_from_then_on(
    make: Make, nvml: FakeNvml, messages: list[str]
) -> None:
    monitor = make(CUDA)
    monitor._look()
    nvml.broken |= {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"}
    for _ in range(2):
        monitor._look()
        values = monitor.take_step(10)
        left = GPU_FIGURES - {"gpu_power_w", "gpu_energy_j"}
        assert {name for name in values if "gpu" in name} == {f"machine/{name}" for name in left}
        assert "energy/j_per_sampled_token" not in values
    assert sorted(message.split()[0] for message in messages) == ["machine/gpu_energy_j", "machine/gpu_power_w"]
    assert all("left out from now on (NVMLError: Not Supported)" in message for message in messages)


def test_a_part_of_a_gpu_is_found_too(make: Make, nvml: FakeNvml) -> None:
    nvml.name = f"MIG-{UUID}"
    assert make(CUDA).take_step()["machine/gpu_util"] == 0.5


def test_a_missing_package_and_a_missing_driver_are_told_before_anything_starts(
    make: Make, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    nvml.broken.add("nvmlInit")
    with pytest.raises(UserError, match="Driver Not Loaded.*monitor_interval = 0"):
        make(CUDA)
    nvml.broken.clear()
    nvml.name = "GPU-another"
    with pytest.raises(UserError, match="NVML has no figures of cuda"):
        make(CUDA)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match="pip install nvidia-ml-py, or set tracking.monitor_interval = 0"):
        make(CUDA)
    assert make(CPU).take_step()
    assert threading.active_count() == before + 1


def test_rapl_counts_packages_and_their_memory_through_a_wrap(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "powercap"
    packages = [domain(root, f"intel-rapl:{i}", f"package-{i}", 990_000_000) for i in (0, 1)]
    memory = domain(root, "intel-rapl:0:1", "dram", 5_000_000)
    parts = [domain(root, "intel-rapl:0:0", "core", 0), domain(root, "intel-rapl:2", "psys", 0)]
    unreadable = domain(root, "intel-rapl:3", "package-3", 0)
    (unreadable / "energy_uj").unlink()
    monitor = make(rapl=root)
    (packages[0] / "energy_uj").write_text("996000000")
    monitor._look()
    (packages[0] / "energy_uj").write_text("2000000")
    (packages[1] / "energy_uj").write_text("991000000")
    (memory / "energy_uj").write_text("7000000")
    for part in parts:
        (part / "energy_uj").write_text("500000000")
    values = monitor.take_step(3)
    # 6 J, then 6 J through the wrap at 1000 J, 1 J of the other package, 2 J of memory.
    assert values["machine/energy_j"] == pytest.approx(15)
    assert values["energy/j_per_sampled_token"] == pytest.approx(5)
    assert monitor.take_step()["machine/energy_j"] == 0


def test_the_energy_of_a_gpu_run_is_all_of_it_or_none(make: Make, nvml: FakeNvml, tmp_path: Path) -> None:
    package = domain(tmp_path / "powercap", "intel-rapl:0", "package-0", 0)
    monitor = make(CUDA, rapl=tmp_path / "powercap")
    (package / "energy_uj").write_text("4000000")
    nvml.figures["energy"] = 6_000
    assert monitor.take_step(5)["energy/j_per_sampled_token"] == pytest.approx(2)
    nvml.broken.add("nvmlDeviceGetTotalEnergyConsumption")
    (package / "energy_uj").write_text("5000000")
    values = monitor.take_step(5)
    assert values["machine/energy_j"] == 1 and "energy/j_per_sampled_token" not in values


def test_the_thread_looks_every_interval_and_passes_its_figures_on(make: Make, nvml: FakeNvml) -> None:
    samples: list[tuple[float, dict[str, float]]] = []
    monitor = make(CUDA, 0.01, on_sample=lambda when, figures: samples.append((when, dict(figures))))
    until(lambda: len(samples) >= 3)
    times = [when for when, _ in samples]
    assert times == sorted(times) and times[1] - times[0] >= 0.01
    assert samples[0][1].keys() == GPU_FIGURES - {"gpu_energy_j"} | {"rss_gib", "cpu_load"}
    assert samples[0][1]["gpu_power_w"] == 400
    assert 0 <= samples[0][1]["cpu_load"] < 1000
    assert monitor.take_step()["machine/gpu_power_w"] == 400


def test_a_listener_that_fails_is_reported_and_the_looks_go_on(make: Make, messages: list[str]) -> None:
    calls: list[float] = []

    def fail(when: float, figures: object) -> None:
        calls.append(when)
        raise OSError("disk full")

    monitor = make(CPU, 0.01, on_sample=fail)
    until(lambda: bool(calls))
    time.sleep(0.1)
    assert monitor.take_step()["machine/rss_gib"] > 0
    assert len(calls) == 1
    assert messages == ["samples of the machine are no longer passed on (OSError: disk full)"]


def test_close_ends_the_thread_and_nvml(make: Make, nvml: FakeNvml) -> None:
    monitor = make(CUDA, 0.01)
    names = {thread.name for thread in threading.enumerate()}
    assert "gadcore-monitor" in names and nvml.open == 1
    monitor.close()
    monitor.close()
    assert "gadcore-monitor" not in {thread.name for thread in threading.enumerate()}
    assert nvml.open == 0
