"""What the machine does while a run trains: the figures machine/* and energy/* of metrics.jsonl.

A thread looks at utilisation, memory, power and clocks once per interval. What only grows (CPU seconds, page faults,
energy) is read at both ends of a step, so that the difference is exact. Nothing here may end a run: a figure that
cannot be read is reported once and left out from then on.

    machine/cpu_load              CPU seconds of this process per second: 2.0 is two cores at work
    machine/rss_gib               resident memory of this process, the largest seen
    machine/major_faults          page faults of this process that had to wait for a disk
    machine/minor_faults          .. and those that had not
    machine/energy_j              of the CPU packages and their memory, all processes; where RAPL can be read
    machine/gpu_util              share of the time in which a kernel ran
    machine/gpu_memory_used_gib   on the device, all processes, the largest seen
    machine/gpu_power_w           mean
    machine/gpu_sm_clock_mhz      mean
    machine/gpu_throttled_share   share of the looks at which something held the clocks down
    machine/gpu_energy_j          of the GPU board
    energy/j_per_sampled_token    all energy above over the tokens sampled in the step, training included
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch

from gadcore.errors import UserError

Reading = Callable[[], float]

RAPL = Path("/sys/class/powercap")
LARGEST = {"machine/rss_gib", "machine/gpu_memory_used_gib"}
PER_SECOND = {"machine/cpu_load"}
CPU_ENERGY, GPU_ENERGY = "machine/energy_j", "machine/gpu_energy_j"
# NVML's bits for clocks that are lower than they could be; idleness and clocks set by hand are no trouble.
SLOWDOWNS = {
    0x04: "SwPowerCap",
    0x08: "HwSlowdown",
    0x10: "SyncBoost",
    0x20: "SwThermalSlowdown",
    0x40: "HwThermalSlowdown",
    0x80: "HwPowerBrakeSlowdown",
}
JOIN_S = 5.0


class MachineMonitor:
    """Samples the machine in a thread of its own, from its construction to close()."""

    def __init__(
        self,
        device: torch.device,
        interval: float,
        log: Callable[[str], None],
        on_sample: Callable[[float, Mapping[str, float]], None] | None = None,
        *,
        rapl: Path = RAPL,
    ) -> None:
        """interval: seconds between two looks, above 0.

        log: takes sentences, and is called only by begin_step(), take_step() and close().
        on_sample: takes the time (time.perf_counter()) and the figures of every look, without "machine/" before their
        names, in the monitor's thread.
        Raises UserError where the device is a CUDA device and NVML cannot be used.
        """
        self._interval = interval
        self._log = log
        self._on_sample = on_sample
        self._messages: list[str] = []
        process = psutil.Process()
        self._gauges: dict[str, Reading] = {"machine/rss_gib": lambda: process.memory_info().rss / 2**30}
        self._counters: dict[str, Reading] = {
            "machine/cpu_load": time.process_time,
            "machine/major_faults": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            "machine/minor_faults": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        }
        meter = Rapl(rapl)
        if meter.domains:
            self._counters[CPU_ENERGY] = meter.joules
        self._gpu = Gpu(device, self._messages.append) if device.type == "cuda" else None
        if self._gpu is not None:
            self._gauges |= self._gpu.gauges
            self._counters |= self._gpu.counters
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._seen: dict[str, list[float]] = {}
        self.begin_step()
        self._thread = threading.Thread(target=self._run, name="gadcore-monitor", daemon=True)
        self._thread.start()

    def begin_step(self) -> None:
        """Forgets what came since the last step."""
        with self._lock:
            self._begin()
        self._deliver()

    def take_step(self, sampled_tokens: float | None = None) -> dict[str, float]:
        """The figures since the step began, by name; the next step begins. Units are in the module's docstring.

        sampled_tokens: that the student drew in the step; energy per token is left out without them.
        """
        with self._lock:
            if not self._seen:
                # The step was shorter than the interval.
                self._look()
            values = {
                name: max(seen) if name in LARGEST else fmean(seen)
                for name, seen in self._seen.items()
                if name in self._gauges
            }
            before, began = self._before, self._began
            self._begin()
            for name, now in self._before.items():
                grown = now - before[name]
                values[name] = grown / (self._began - began) if name in PER_SECOND else grown
        # Without the GPU's own energy the rest would pass for all of it.
        needed = CPU_ENERGY if self._gpu is None else GPU_ENERGY
        if sampled_tokens and needed in values:
            joules = values.get(CPU_ENERGY, 0.0) + values.get(GPU_ENERGY, 0.0)
            values["energy/j_per_sampled_token"] = joules / sampled_tokens
        self._deliver()
        return values

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._closing.set()
        self._thread.join(JOIN_S)
        self._deliver()
        if self._gpu is not None and not self._thread.is_alive():
            self._gpu.close()
            self._gpu = None

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            with self._lock:
                figures = self._look()
            self._pass_on(figures)

    def _pass_on(self, figures: Mapping[str, float]) -> None:
        if self._on_sample is None:
            return
        try:
            self._on_sample(
                time.perf_counter(), {name.removeprefix("machine/"): value for name, value in figures.items()}
            )
        except Exception as error:
            self._on_sample = None
            self._messages.append(f"samples of the machine are no longer passed on ({type(error).__name__}: {error})")

    def _begin(self) -> None:
        self._seen = {}
        self._began = self._looked = time.perf_counter()
        self._before = self._latest = self._read(self._counters)

    def _look(self) -> dict[str, float]:
        """The gauges, and the rates since the last look."""
        figures = self._read(self._gauges)
        for name, value in figures.items():
            self._seen.setdefault(name, []).append(value)
        last, self._looked = self._looked, time.perf_counter()
        # All counters: a step may last longer than one of them takes to wrap around.
        before, self._latest = self._latest, self._read(self._counters)
        for name in PER_SECOND & self._latest.keys():
            figures[name] = (self._latest[name] - before[name]) / (self._looked - last)
        return figures

    def _read(self, readings: dict[str, Reading]) -> dict[str, float]:
        """All readings; those that fail are reported and dropped."""
        values = {}
        for name, reading in list(readings.items()):
            try:
                values[name] = float(reading())
            except Exception as error:
                # Drivers fail in many ways, and none of them is worth a run.
                del readings[name]
                self._messages.append(
                    f"{name} cannot be read and is left out from now on ({type(error).__name__}: {error})"
                )
        return values

    def _deliver(self) -> None:
        while self._messages:
            self._log(self._messages.pop(0))


class Rapl:
    """Energy counters of the CPU packages and of their memory, from Linux' powercap interface.

    domains: folder of every counter that can be read (by default only root can); none is ordinary.
    """

    def __init__(self, root: Path) -> None:
        self.domains = [folder for folder in sorted(root.glob("intel-rapl:*")) if _counts(folder)]
        self._limits = [int((folder / "max_energy_range_uj").read_text()) for folder in self.domains]
        self._last = [self._microjoules(folder) for folder in self.domains]
        self._total = 0

    def joules(self) -> float:
        """Since the construction; exact as long as no counter wraps around twice between two calls."""
        now = [self._microjoules(folder) for folder in self.domains]
        for last, new, limit in zip(self._last, now, self._limits, strict=True):
            self._total += new - last if new >= last else new - last + limit
        self._last = now
        return self._total / 1e6

    @staticmethod
    def _microjoules(folder: Path) -> int:
        return int((folder / "energy_uj").read_text())


def _counts(folder: Path) -> bool:
    try:
        name = (folder / "name").read_text()
        readable = all((folder / file).read_text() for file in ("energy_uj", "max_energy_range_uj"))
    except OSError:
        return False
    # The other domains (core, uncore, psys) are parts of these, or hold them.
    return readable and name.startswith(("package", "dram"))


class Gpu:
    """NVML's view of a CUDA device of torch's. gauges, counters: figures by name, in the units of the module."""

    def __init__(self, device: torch.device, log: Callable[[str], None]) -> None:
        """log: takes the sentence that a reason for low clocks was seen, once per reason."""
        self._log = log
        self._reported: set[int] = set()
        switch_off = "or set tracking.monitor_interval = 0"
        try:
            import pynvml
        except ImportError as error:
            raise UserError(
                f"figures of the GPU need the package nvidia-ml-py ({error}): pip install nvidia-ml-py, {switch_off}"
            ) from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
            self._handle = self._find(str(torch.cuda.get_device_properties(device).uuid))
        except pynvml.NVMLError as error:
            raise UserError(f"NVML has no figures of {device} ({error}): mend the driver, {switch_off}") from error
        handle = self._handle
        self.gauges: dict[str, Reading] = {
            "machine/gpu_util": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "machine/gpu_memory_used_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
            "machine/gpu_power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "machine/gpu_sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "machine/gpu_throttled_share": self._throttled,
        }
        self.counters: dict[str, Reading] = {
            GPU_ENERGY: lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        }

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _find(self, uuid: str) -> Any:
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError_NotFound:
            # A part of a GPU (multi-instance) is a device of its own to CUDA.
            return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def _throttled(self) -> float:
        bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        reasons = {bit for bit in SLOWDOWNS if bits & bit}
        for bit in sorted(reasons - self._reported):
            self._log(f"the GPU's clocks are held down: {SLOWDOWNS[bit]} (machine/gpu_throttled_share says how often)")
        self._reported |= reasons
        return float(bool(reasons))
