"""The memory that a call needs on top of what is there before it.

On Linux: the peak of the resident set (VmHWM) since it was last reset, which writing 5 to /proc/self/clear_refs does.
Freed memory that the allocator keeps is given back first, or the call would reuse it unseen.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gadcore.memory.meter import HostMeter

R = TypeVar("R")

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def extra_peak(call: Callable[[], R]) -> tuple[R, int | None]:
    """What `call` returns, and the peak of its extra resident memory in bytes; None where it cannot be measured."""
    gc.collect()
    # The pool of tensors too, where this process has one.
    HostMeter().give_back()
    if not reset_peak():
        return call(), None
    before = resident("VmRSS")
    result = call()
    return result, max(0, resident("VmHWM") - before)


def reset_peak() -> bool:
    """Sets this process's VmHWM to what is resident now; False where that cannot be done."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Returns freed memory to the system."""
    libc = ctypes.CDLL(None)
    # glibc's; other C libraries keep little.
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
