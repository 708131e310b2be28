"""A stand-in for a GPU under torch: code that takes another way on CUDA takes that way, in this process, on a CPU.

    with gpu(total=256 << 20) as device:
        model.to("cuda")                     # lies on the stand-in, and takes memory of it
        device.allocator.most_reserved       # what torch's caching allocator would have held

Tensors that are made on, moved to or computed from "cuda" say that they lie there, and those of two devices do not mix
(tensors.py); they take memory as torch's caching allocator does (allocator.py); copies on streams run as late as CUDA
allows (streams.py); autocast widens what CUDA's does (amp.py); torch.cuda answers (api.py). Triton's kernels run in the
interpreter, in a process that was started for it (bench/offline/interpreter.py). Not modelled: time, graphs, kernels'
scratch memory, the order of atomics, and what a GPU's arithmetic rounds differently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.offline.cuda_standin import streams
from bench.offline.cuda_standin.allocator import Allocator
from bench.offline.cuda_standin.amp import cuda_autocast
from bench.offline.cuda_standin.api import cuda_api
from bench.offline.cuda_standin.tensors import Tensors


@contextmanager
def gpu(total: int, *, context: int = 0, unit: int = 512) -> Iterator[Tensors]:
    """A GPU of `total` bytes, of which the driver takes `context`. unit: see Allocator.

    Tensors that were there before are on the host; those that outlive the block are of no use.
    """
    tensors = Tensors(Allocator(total, context, unit))
    streams.current[:] = [streams.Stream()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_api(tensors))
        stack.enter_context(cuda_autocast())
        if os.environ.get("TRITON_INTERPRET") == "1":
            stack.enter_context(_interpreted(tensors))
        stack.enter_context(tensors.installed())
        yield tensors


@contextmanager
def _interpreted(tensors: Tensors) -> Iterator[None]:
    """Triton's interpreter finds the tensors where they are in truth; a kernel takes none of the host's."""
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and not tensors.on_gpu(value) and not tensors.is_pinned(value):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        with tensors.real():
            return call(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = call
