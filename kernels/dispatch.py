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

from gadcore.kernels.cpu import native
from gadcore.kernels.ops import OPS

Impl = Literal["auto", "reference", "triton", "cpu"]


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors (its interpreter, a test tool)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_missing() -> str | None:
    """None if the Triton kernels can be imported, else the reason."""
    return None if find_spec("triton") else "the package triton is not installed: `pip install triton`"


@functools.cache
def flash_missing() -> str | None:
    """None if FlashAttention's kernels can be imported, else the reason."""
    # The older package, flash-attn, has no flash_attn.cute.
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed: `pip install 'gadcore[cuda]'`"
    return triton_missing()


def choose(op: str, impl: Impl, tensor: Tensor) -> Literal["reference", "triton", "cpu"]:
    """The implementation for a call of `op`, one of OPS, whose computation follows `tensor`'s device and dtype.

    Raises ValueError for a name that is none, or for an implementation that does not take this device or dtype;
    RuntimeError for one that is not installed or built.
    """
    dtypes = OPS[op].triton
    if impl == "auto" and tensor.is_cuda and tensor.dtype in dtypes:
        if triton_missing() is None:
            return "triton"
        _slow(f"{op} on {tensor.device.type} computes with the PyTorch reference: {triton_missing()}")
        return "reference"
    if impl != "triton" or not dtypes:
        return native.choose(op, impl, tensor)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: impl={impl!r} computes in {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    reason = triton_missing()
    if reason is not None:
        raise RuntimeError(f'{op}: impl="triton" is not available: {reason}')
    if not tensor.is_cuda and not (tensor.device.type == "cpu" and interpreted()):
        raise ValueError(f'{op}: impl="triton" needs tensors on a GPU, got {tensor.device}')
    return "triton"


def implementation(op: str, chosen: str, which: str = "forward") -> Callable[..., Any]:
    """The function behind a choice, for one of the op's passes."""
    if chosen == "cpu":
        return native.function(op, which)
    # Not imported before it is wanted: triton is not there on every machine.
    return getattr(importlib.import_module(f"gadcore.kernels.{chosen}.{op}"), which)


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
