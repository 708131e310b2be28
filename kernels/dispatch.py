"""Which implementation of an op computes: the one that was asked for by name, or for "auto" the fastest that is
there."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from gadcore.kernels import _native

Impl = Literal["auto", "reference", "triton", "cpu"]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors (its interpreter, a test tool)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_missing() -> str | None:
    """None if the Triton kernels can be imported, else the reason."""
    return None if find_spec("triton") else "the package triton is not installed: `pip install triton`"


def choose(
    op: str,
    impl: Impl,
    tensor: Tensor,
    *,
    native: str,
    triton: bool = True,
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
) -> Literal["reference", "triton", "cpu"]:
    """The implementation for a call of `op` whose computation follows `tensor`'s device and dtype.

    native: name of the op in the native library. triton: whether `op` has a Triton kernel. dtypes: what the kernels
    take. Raises ValueError for a name that is none, or for an implementation that does not take this device or dtype;
    RuntimeError for one that is not installed or built.
    """
    on_cpu, fits = tensor.device.type == "cpu", tensor.dtype in dtypes
    if impl == "reference":
        return "reference"
    if impl == "auto":
        if not fits:
            return "reference"
        if tensor.is_meta:
            # Shapes only: whatever the op's name, no implementation runs.
            return "cpu"
        if on_cpu:
            return "cpu" if _native.available(native) else "reference"
        if tensor.is_cuda and triton:
            if triton_missing() is None:
                return "triton"
            _slow(f"{op} on {tensor.device.type} computes with the PyTorch reference: {triton_missing()}")
        return "reference"
    if impl not in ("cpu", "triton") or (impl == "triton" and not triton):
        names = ["auto", "reference", "cpu", *(["triton"] if triton else [])]
        raise ValueError(f"{op}: impl must be one of {', '.join(names)}, is {impl!r}")
    if not fits:
        raise ValueError(f"{op}: impl={impl!r} computes in {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    if impl == "cpu":
        if not on_cpu:
            raise ValueError(f'{op}: impl="cpu" needs tensors on the CPU, got {tensor.device}')
        _native.require(native)
        return "cpu"
    reason = triton_missing()
    if reason is not None:
        raise RuntimeError(f'{op}: impl="triton" is not available: {reason}')
    if not tensor.is_cuda and not (on_cpu and interpreted()):
        raise ValueError(f'{op}: impl="triton" needs tensors on a GPU, got {tensor.device}')
    return "triton"


def implementation(chosen: str, native: str, module: str, function: str) -> Callable[..., Any]:
    """The function behind a choice: the native op, or a function of a module with Triton kernels."""
    if chosen == "cpu":
        # Loads the library, for whoever calls the op itself.
        _native.require(native)
        return getattr(torch.ops.gadcore, native)
    # Not imported before it is wanted: triton is not there on every machine.
    return getattr(importlib.import_module(f"gadcore.kernels.{module}"), function)


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a head as an enabled autocast wants those of a matrix product; differentiable."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding what an implementation computes in float32 on purpose."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


@functools.cache
def _slow(message: str) -> None:
    warnings.warn(message, stacklevel=4)
