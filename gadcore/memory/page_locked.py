"""Host memory that a GPU copies to and from by itself: locked in place, in the size that is asked for.

torch's own page-locked memory comes in powers of two, here up to twice the size.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from gadcore.errors import UserError, cause


def page_locked(what: str, size: int, otherwise: str) -> Tensor:
    """Bytes [size], zero at first. UserError where the host has not that many.

    what: they are for, and otherwise: a setting that does without them, for the message.
    """
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A fork would copy what is locked; large pages are fewer to lock. Not every kernel knows of both.
        for advice in (mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):
            with suppress(OSError):
                pages.madvise(advice)
        host = torch.frombuffer(pages, dtype=torch.uint8)
        _check(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot lock {size / 2**20:.0f} MiB of host memory for {what}: {cause(error)}; give the job more host "
            f"memory, raise its limit of locked memory (ulimit -l), or {otherwise}"
        ) from error
    return host


def unlock(host: Tensor) -> None:
    """Makes it ordinary memory again, which goes with its last tensor. No copy may be under way."""
    _check(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))


def _check(status: Any) -> None:
    """RuntimeError where a call of the CUDA runtime has failed."""
    if code := int(status):
        raise torch.cuda.CudaError(code)
