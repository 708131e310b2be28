"""The CUDA C++ library, gadcore/_cuda.so, built from csrc/cuda where nvcc is, and called through its plain C ABI."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch

# Not resolved: gadcore/kernels may be a symlink, and the library lies in gadcore/.
LIBRARY = Path(__file__).parents[2] / "_cuda.so"

_REBUILD = "build it with `python csrc/cuda/build.py` and a CUDA toolkit of version 12 or later"

# Of each op's arguments, but the stream that comes last.
_SIGNATURES: dict[str, list[type]] = {"cast_copy": [c_void_p, c_int64, c_int64]}


class Library:
    """A built csrc/cuda. The library that the tests build for the CPU takes CPU tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.gadcore_cuda_error.restype = c_char_p
        self._library.gadcore_cuda_error.argtypes = [c_int]
        self._functions: dict[str, ctypes._NamedFuncPointer] = {}
        for op, signature in _SIGNATURES.items():
            function = getattr(self._library, f"gadcore_{op}", None)
            if function is not None:
                function.argtypes, function.restype = [*signature, c_void_p], c_int
                self._functions[op] = function

    def has(self, op: str) -> bool:
        """Whether the library was built from a source that knows `op`."""
        return op in self._functions

    def launch(self, op: str, device: torch.device, *arguments: int) -> None:
        """Calls an op's function on the device's current stream, and does not wait. Raises RuntimeError if it fails."""
        if device.type == "cuda":
            with torch.cuda.device(device):
                error = self._functions[op](*arguments, torch.cuda.current_stream(device).cuda_stream)
        else:
            error = self._functions[op](*arguments, 0)
        if error:
            message = self._library.gadcore_cuda_error(error).decode()
            raise RuntimeError(f"the CUDA op {op} could not be launched: {message} (error {error})")


@functools.cache
def why_missing(op: str) -> str | None:
    """None if the CUDA op can be called, else the reason and the remedy."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    return None if loaded.has(op) else f"{LIBRARY} is older than this source and lacks {op}: {_REBUILD}"


def available(op: str) -> bool:
    """Whether the CUDA op is there; where it is not, the first call in a process says why in a warning."""
    reason = why_missing(op)
    if reason is not None and os.environ.get("GADCORE_NO_NATIVE") != "1":
        _notice(reason)
    return reason is None


def require(op: str) -> Library:
    """The library with the op; raises RuntimeError where an op that was asked for by name is not there."""
    loaded = _load()
    reason = why_missing(op)
    if reason is not None or isinstance(loaded, str):
        raise RuntimeError(f"the CUDA op {op} is not available: {reason}")
    return loaded


@functools.cache
def _load() -> Library | str:
    """The library, or the reason why there is none."""
    if os.environ.get("GADCORE_NO_NATIVE") == "1":
        return "GADCORE_NO_NATIVE=1 is set"
    if not LIBRARY.exists():
        return f"{LIBRARY} was not built: {_REBUILD}"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU, or this torch was built without CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    try:
        return Library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} cannot be loaded ({error}): {_REBUILD}"


@functools.cache
def _notice(reason: str) -> None:
    warnings.warn(f"CUDA C++ ops are not in use, PyTorch computes instead: {reason}", stacklevel=4)
