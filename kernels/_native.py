"""The native CPU library, gadcore/_native.so, that setup.py builds from csrc/cpu where it can."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

# Not resolved: gadcore/kernels may be a symlink, and the library lies in gadcore/.
LIBRARY = Path(__file__).parent.parent / "_native.so"

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
