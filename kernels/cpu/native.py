"""The native CPU library, gadcore/_native.so, that setup.py builds from csrc/cpu where it can, and when it computes."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gadcore.kernels.ops import OPS, native_op

# Of the ops that nothing but a CPU gains from.
Impl = Literal["auto", "reference", "cpu"]

# Not resolved: gadcore/kernels may be a symlink, and the library lies in gadcore/.
LIBRARY = Path(__file__).parents[2] / "_native.so"

_REBUILD = "build it with `pip install --no-build-isolation --no-deps -e .` and a C++ compiler"


def _load() -> str | None:
    """Loads the library; None, or why it cannot be."""
    if os.environ.get("GADCORE_NO_NATIVE") == "1":
        return "GADCORE_NO_NATIVE=1 is set"
    if not LIBRARY.exists():
        return f"{LIBRARY} was not built: {_REBUILD}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} cannot be loaded ({error}), was it built for another torch? {_REBUILD}"
    return None


# At import, so that torch.compile, which traces the choice of an implementation, sees a constant and no file access.
_unusable = _load()


def choose(op: str, impl: str, tensor: Tensor) -> Literal["reference", "cpu"]:
    """What computes a call of `op`, one of OPS, that no GPU code takes; as dispatch.choose, with its errors."""
    fits = tensor.dtype in OPS[op].cpu
    if impl == "reference":
        return "reference"
    if impl == "auto":
        if tensor.is_meta:
            # Shapes only: whatever the op's name, no implementation runs.
            return "cpu" if fits or tensor.dtype in OPS[op].triton else "reference"
        return "cpu" if fits and tensor.device.type == "cpu" and available(native_op(op)) else "reference"
    if impl != "cpu" or not OPS[op].cpu:
        names = ["auto", "reference", *(name for name in ("cpu", "triton") if getattr(OPS[op], name))]
        raise ValueError(f"{op}: impl must be one of {', '.join(names)}, is {impl!r}")
    if not fits:
        raise ValueError(f"{op}: impl={impl!r} computes in {', '.join(map(str, OPS[op].cpu))}, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f'{op}: impl="cpu" needs tensors on the CPU, got {tensor.device}')
    require(native_op(op))
    return "cpu"


def function(op: str, which: str = "forward") -> Callable[..., Any]:
    """The C++ of a pass of `op`. Raises RuntimeError where it is not there."""
    require(native_op(op, which))
    return getattr(torch.ops.gadcore, native_op(op, which))  # type: ignore[no-any-return]


def why_missing(op: str) -> str | None:
    """None if torch.ops.gadcore.<op> can be called, else the reason and the remedy."""
    if _unusable is not None:
        return _unusable
    if not hasattr(torch.ops.gadcore, op):
        return f"{LIBRARY} is older than this source and lacks {op}: {_REBUILD}"
    return None


def available(op: str) -> bool:
    """Whether the native op is there; where it is not, the first call in a process says why in a warning."""
    reason = why_missing(op)
    if reason is not None and not torch.compiler.is_compiling() and os.environ.get("GADCORE_NO_NATIVE") != "1":
        _notice(reason)
    return reason is None


def require(op: str) -> None:
    """Raises RuntimeError where the native op, asked for by name, is not there."""
    reason = why_missing(op)
    if reason is not None:
        raise RuntimeError(f"the native CPU op {op} is not available: {reason}")


@functools.cache
def _notice(reason: str) -> None:
    warnings.warn(f"native CPU ops are not in use, the PyTorch references compute instead: {reason}", stacklevel=4)
