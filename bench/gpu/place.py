"""Where a stage is measured: a GPU, or, in a rehearsal, a CPU that walks the same way with tiny sizes."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from bench import record
from bench.runner import Clock, wall
from gadcore.errors import cause

Row = dict[str, Any]

# Dense bfloat16 products of the vendor's data sheets, FLOP/s, by what a device's name has in it; the first that fits.
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
}


@dataclass(frozen=True)
class Place:
    """memory: bytes of the device. tiny: small sizes, seconds in all. name: of the device."""

    device: torch.device
    name: str
    memory: int
    tiny: bool

    @classmethod
    def find(cls, *, rehearse: bool, quick: bool) -> Place:
        """The first GPU, or the CPU for a rehearsal. Raises RuntimeError where there is no GPU."""
        if rehearse:
            from gadcore.memory.resident import memory_limit

            return cls(torch.device("cpu"), "a CPU, rehearsing", memory_limit(), True)
        properties = torch.cuda.get_device_properties(0)
        return cls(torch.device("cuda", 0), properties.name, properties.total_memory, quick)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of dense bfloat16 products by the data sheet; None for a device that is not known."""
        return next((rate for name, rate in PEAKS.items() if name in self.name), None)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of its machine."""
        if not self.on_gpu:
            return record.machine()
        return record.machine() | {"gpu": self.name, "gpu_memory_gib": round(self.memory / 2**30, 1)}

    @property
    def clock(self) -> Clock:
        return event_clock if self.on_gpu else wall

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall seconds of a call, with all that it has queued."""
        self.synchronise()
        start = time.perf_counter()
        call()
        self.synchronise()
        return time.perf_counter() - start

    def give_back(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def event_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds a call between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def attempt(case: str, measure: Callable[[], Row], place: Place) -> Row:
    """A row of a case: its figures, or why there are none. What fails is told, and ends nothing else."""
    start = time.perf_counter()
    try:
        row = {"case": case, "status": "ok", **_finite(measure())}
    except Exception as error:
        traceback.print_exc()
        row = failed(case, cause(error))
    row["seconds"] = round(time.perf_counter() - start, 3)
    place.give_back()
    return row


def _finite(figures: Row) -> Row:
    """JSON has no nan: one is written as a word."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def failed(case: str, error: str) -> Row:
    """The row of a case that broke off: a failed gate, so that the command ends with 1."""
    return {"case": case, "status": "failed", "error": error, "gate": "fail"}


def gate(passed: bool) -> str:
    return "pass" if passed else "fail"


def installed(module: str) -> bool:
    return find_spec(module) is not None


def missing(case: str, module: str) -> Row:
    """The row of an opponent that is not there."""
    return {"case": case, "status": "not installed", "error": f"there is no Python package {module}"}
