"""What the kernel knows of this process's memory: resident now, at most, page by page. Linux; elsewhere only rss()."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import psutil
from torch import Tensor

PAGE = mmap.PAGESIZE
_STATM, _STATUS, _CLEAR = (Path("/proc/self") / name for name in ("statm", "status", "clear_refs"))
_MADV_DONTNEED = 4
# As the kernel writes "no limit" (cgroup v1), rounded down to pages.
_UNLIMITED = 2**60


def rss() -> int:
    """Resident bytes of this process."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * PAGE
    return psutil.Process().memory_info().rss


def reset_peak() -> bool:
    """Lets peak() begin anew; False where the kernel does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The most resident bytes since reset_peak()."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None, "the kernel reports no VmHWM"
    return int(found[1]) * 1024


def trim() -> None:
    """Gives freed memory that malloc still keeps back to the kernel."""
    if sys.platform == "linux" and hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def drop_pages(tensor: Tensor) -> None:
    """Frees the memory of a CPU tensor whose content is no longer wanted; its address stays, its whole pages are zero.

    For memory of malloc's alone, never for a mapped file.
    """
    start, length = _whole_pages(tensor)
    if length and _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise failed")


def resident_bytes(tensor: Tensor) -> int:
    """Bytes of a CPU tensor that are in memory: pages that were never written are not."""
    start, length = _whole_pages(tensor)
    if not length:
        return tensor.nbytes
    pages = np.empty(length // PAGE, np.uint8)
    if _libc().mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)) != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int((pages & 1).sum()) * PAGE + tensor.nbytes - length


def memory_limit() -> int:
    """Bytes that this process may use at most: the machine's memory, or less where a control group says so."""
    limits = [psutil.virtual_memory().total]
    for path in _cgroup_limits():
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            limits.append(int(text))
    return min(limits)


def _cgroup_limits() -> list[Path]:
    """Files that may hold a limit for this process, version 1 and 2 of control groups."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root, found = Path("/sys/fs/cgroup"), []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        own = path.lstrip("/")
        if "memory" in controllers.split(","):
            found += [root / "memory" / own / "memory.limit_in_bytes", root / "memory" / "memory.limit_in_bytes"]
        elif not controllers:
            found += [root / own / "memory.max", root / "memory.max"]
    return found


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of the pages that lie in the tensor as a whole. For a contiguous CPU tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("only contiguous CPU tensors have pages")
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    return start, max(0, end - start)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
