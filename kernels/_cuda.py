"""The CUDA C++ library, gadcore/_cuda.so, built from csrc/cuda where nvcc is, and called through its plain C ABI."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Not resolved: gadcore/kernels may be a symlink, and the library lies in gadcore/.
LIBRARY = Path(__file__).parent.parent / "_cuda.so"

_REBUILD = "build it with `python csrc/cuda/build.py` and a CUDA toolkit of version 12 or later"

# The numbers of csrc/cuda/device.cuh.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# As many as an SM holds at the registers that the copy kernel takes.
_COPY_BLOCKS_PER_SM = 4

_SIGNATURES: dict[str, list[type]] = {
    "bt_forward": [c_int, c_void_p, c_int64, c_int64, *[c_void_p] * 5, c_int64, c_int64, *[c_void_p] * 8],
    "bt_backward": [
        c_int,
        *[c_void_p] * 2,
        c_int64,
        c_int64,
        *[c_void_p] * 2,
        c_int64,
        c_int64,
        c_int64,
        *[c_void_p] * 4,
    ],
    "cast_copy": [c_void_p, c_int64, c_int64, c_void_p],
}


class BTForward(NamedTuple):
    """scores, pair_loss, margin, slope: [S]; loss: [], the sum of pair_loss. All float32."""

    scores: Tensor
    pair_loss: Tensor
    margin: Tensor
    slope: Tensor
    loss: Tensor


class CopyTable(NamedTuple):
    """entries: int64, `copies` entries of eight numbers and then copies + 1 chunk starts, as csrc/cuda/cast_copy.cu
    reads them, on the device of the tensors whose addresses it holds. chunks: of all copies."""

    entries: Tensor
    copies: int
    chunks: int


class Library:
    """A built csrc/cuda. Its functions launch on the current stream of their tensors' device and do not wait.

    Arguments are those of the ops, already checked. A failed launch raises RuntimeError. The library that the tests
    build for the CPU takes CPU tensors.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.gadcore_cuda_error.restype = c_char_p
        self._library.gadcore_cuda_error.argtypes = [c_int]
        self._functions: dict[str, ctypes._NamedFuncPointer] = {}
        for op, signature in _SIGNATURES.items():
            function = getattr(self._library, f"gadcore_{op}", None)
            if function is not None:
                function.argtypes, function.restype = signature, c_int
                self._functions[op] = function
        # Of each device and stream, the count that a forward launch finds at 0 and leaves at 0.
        self._blocks_done: dict[tuple[torch.device, int], Tensor] = {}

    def has(self, op: str) -> bool:
        """Whether the library was built from a source that knows `op`."""
        return op in self._functions

    def bt_forward(
        self,
        hidden: Tensor,
        last_index: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group_offsets: Tensor,
        has_teacher: Tensor,
    ) -> BTForward:
        """As gadcore.kernels.bt_triton.forward, and the loss, in one launch.

        A weight or bias that is not float32 is cast first, by a launch of its own.
        """
        sequences, groups = last_index.shape[0], has_teacher.shape[0]
        out = hidden.new_empty((4, sequences), dtype=torch.float32)
        group_loss = hidden.new_empty(groups, dtype=torch.float32)
        loss = hidden.new_empty((), dtype=torch.float32)
        weight = weight.float().contiguous()
        bias = None if bias is None else bias.float()
        last_index, group_offsets = last_index.contiguous(), group_offsets.contiguous()
        has_teacher = has_teacher.contiguous()
        with self._stream(hidden.device) as stream:
            done = self._blocks_done.get((hidden.device, stream))
            if done is None:
                done = torch.zeros((), dtype=torch.int32, device=hidden.device)
                self._blocks_done[hidden.device, stream] = done
            self._call(
                "bt_forward",
                _DTYPES[hidden.dtype],
                hidden.data_ptr(),
                hidden.stride(0),
                hidden.stride(1),
                last_index.data_ptr(),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                group_offsets.data_ptr(),
                has_teacher.data_ptr(),
                groups,
                hidden.shape[1],
                *(row.data_ptr() for row in out),
                group_loss.data_ptr(),
                loss.data_ptr(),
                done.data_ptr(),
                stream,
            )
        scores, pair_loss, margin, slope = out.unbind(0)
        return BTForward(scores, pair_loss, margin, slope, loss)

    def bt_backward(
        self, grad_scores: Tensor, hidden: Tensor, last_index: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As gadcore.kernels.bt_triton.backward, in one launch; a weight that is not float32 is cast by others."""
        tokens, width = hidden.shape
        d_hidden = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
        d_weight = torch.empty(width, dtype=torch.float32, device=hidden.device)
        d_bias = torch.empty((), dtype=torch.float32, device=hidden.device)
        grad_scores, last_index = grad_scores.contiguous(), last_index.contiguous()
        w = weight.float().contiguous()
        with self._stream(hidden.device) as stream:
            self._call(
                "bt_backward",
                _DTYPES[hidden.dtype],
                grad_scores.data_ptr(),
                hidden.data_ptr(),
                hidden.stride(0),
                hidden.stride(1),
                last_index.data_ptr(),
                w.data_ptr(),
                tokens,
                last_index.shape[0],
                width,
                d_hidden.data_ptr(),
                d_weight.data_ptr(),
                d_bias.data_ptr(),
                stream,
            )
        return d_hidden, d_weight.to(weight.dtype), d_bias

    def cast_copy(self, table: CopyTable, blocks: int | None = None) -> None:
        """Every copy of a table that gadcore.kernels.cast_copy made, in one launch.

        blocks: how many to launch at most; None fills the GPU.
        """
        if not table.copies:
            return
        device = table.entries.device
        if blocks is None:
            on_gpu = device.type == "cuda"
            processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
            blocks = _COPY_BLOCKS_PER_SM * processors
        with self._stream(device) as stream:
            self._call("cast_copy", table.entries.data_ptr(), table.copies, min(blocks, table.chunks), stream)

    @contextmanager
    def _stream(self, device: torch.device) -> Iterator[int]:
        """Makes the device the current one, and gives its current stream as the C ABI takes it."""
        if device.type != "cuda":
            yield 0
            return
        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream

    def _call(self, op: str, *arguments: int | None) -> None:
        error = self._functions[op](*arguments)
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
