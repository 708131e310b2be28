"""The memory pool of CPU tensors: what a training step frees stays with the process, in large pages, for the next one.

malloc returns a step's memory and takes it anew, page by page, zeroed by the kernel every time. The pool
(csrc/cpu/pool.cpp) serves tensors of 64 KiB to 64 MiB; others stay malloc's. It gives holes back to the system where it
and larger tensors would otherwise hold more than they ever have since release(): a loop does so in its first steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gadcore.kernels.cpu import native


@dataclass(frozen=True)
class PoolSizes:
    """Bytes that tensors of the pool take, and of the large pages that it holds, with holes in them."""

    in_use: int
    held: int


def install() -> bool:
    """Lets CPU tensors that are made from now on lie in the pool, for the rest of the process.

    False where there is no pool: without the native library, outside Linux, or where the system does not let a process
    reserve addresses of twice its memory. Everything else works the same then.
    """
    return native.available("_cpu_pool_install") and torch.ops.gadcore._cpu_pool_install()


def release() -> None:
    """Returns the memory that no tensor uses to the system."""
    if native.available("_cpu_pool_release"):
        torch.ops.gadcore._cpu_pool_release()


def sizes() -> PoolSizes:
    """Raises RuntimeError without the native library."""
    native.require("_cpu_pool_sizes")
    return PoolSizes(*torch.ops.gadcore._cpu_pool_sizes())
