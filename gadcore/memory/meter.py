"""How many bytes of a device are in use, now and at most."""

from __future__ import annotations

from typing import Protocol

import torch

from gadcore import cpu
from gadcore.memory import resident


class Meter(Protocol):
    """limit: bytes that can be in use at most."""

    limit: int

    def in_use(self) -> int: ...
    def reset_peak(self) -> None:
        """Begins a new measurement of peak()."""

    def peak(self) -> int | None:
        """The most bytes in use since reset_peak(); None where the system does not tell."""

    def kept(self) -> int | None:
        """Bytes that an allocator keeps without using them; None where it does not tell."""

    def give_back(self) -> None:
        """Returns them."""


class HostMeter:
    """Resident memory of this process."""

    def __init__(self) -> None:
        self.limit = resident.memory_limit()
        self._knows_peak = False

    def in_use(self) -> int:
        return resident.rss()

    def reset_peak(self) -> None:
        self._knows_peak = resident.reset_peak()

    def peak(self) -> int | None:
        return resident.peak() if self._knows_peak else None

    def kept(self) -> None:
        # malloc counts free bytes, and does not know which of them it has given back already.
        return None

    def give_back(self) -> None:
        cpu.release()
        resident.trim()


class CudaMeter:
    """Memory of a GPU, whoever in this process took it: torch's allocator, vLLM's pool, the CUDA context."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.limit = torch.cuda.mem_get_info(device)[1]

    def in_use(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        # Only torch's allocator keeps a maximum; what others hold does not change within a state.
        above = torch.cuda.max_memory_reserved(self.device) - torch.cuda.memory_reserved(self.device)
        return self.in_use() + above

    def kept(self) -> int:
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def give_back(self) -> None:
        torch.cuda.empty_cache()


def meter_of(device: torch.device) -> Meter:
    return CudaMeter(device) if device.type == "cuda" else HostMeter()
