"""torch.cuda as the stand-in answers it: an H100 of a size that is chosen, driven by streams.py and allocator.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from bench.offline.cuda_standin import streams
from bench.offline.cuda_standin.tensors import CUDA, Tensors

NAME, UUID = "NVIDIA H100 80GB HBM3 (stand-in)", "00000000-0000-0000-0000-000000000000"


class _Error(int):
    success = 0


class _Runtime:
    """torch.cuda.cudart(), as far as page-locked memory needs it: driver_types.h, cudaSuccess = 0."""

    cudaError = _Error

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.registered = tensors, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if address in self.registered:
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.registered[address] = size
        self._tensors.pinned_bytes += size
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"CUDA error {code}"

    def cudaHostUnregister(self, address: int) -> int:
        if address not in self.registered:
            return 713  # cudaErrorHostMemoryNotRegistered
        self._tensors.pinned_bytes -= self.registered.pop(address)
        return 0


def _answers(tensors: Tensors) -> dict[str, Any]:
    memory = tensors.allocator
    properties = SimpleNamespace(
        name=NAME, uuid=UUID, major=9, minor=0, total_memory=memory.total, multi_processor_count=4,
        L2_cache_size=50 << 20, warp_size=32,
    )  # fmt: skip
    runtime = _Runtime(tensors)

    @contextmanager
    def stream(chosen: streams.Stream | None) -> Iterator[None]:
        streams.current.append(streams.current[-1] if chosen is None else chosen)
        try:
            yield
        finally:
            streams.current.pop()

    def synchronize(device: Any = None) -> None:
        for each in list(made):
            each.run()
        streams.current[0].run()

    made: list[streams.Stream] = []

    class Stream(streams.Stream):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    state = torch.zeros(16, dtype=torch.uint8)
    return {
        "Event": streams.Event,
        "Stream": Stream,
        "_cudart": runtime,
        "_exchange_device": lambda index: 0,
        "_initialized": True,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": lambda index: 0,
        "cudart": lambda: runtime,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: streams.current[-1],
        "default_stream": lambda device=None: streams.current[0],
        "device_count": lambda: 1,
        "empty_cache": memory.empty_cache,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device=None: state.clone(),
        "get_rng_state_all": lambda: [state.clone()],
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: memory.most_allocated,
        "max_memory_reserved": lambda device=None: memory.most_reserved,
        "mem_get_info": lambda device=None: (memory.free, memory.total),
        "memory_allocated": lambda device=None: memory.allocated,
        "memory_reserved": lambda device=None: memory.reserved,
        "reset_peak_memory_stats": lambda device=None: memory.reset_peak(),
        "set_device": lambda device: None,
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
        "stream": stream,
        "synchronize": synchronize,
    }


@contextmanager
def cuda_api(tensors: Tensors) -> Iterator[None]:
    """torch.cuda answers for the stand-in in the block."""
    before = {}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [setattr(torch.cuda, name, value) for name, value in before.items()])
        for name, value in _answers(tensors).items():
            before[name] = getattr(torch.cuda, name)
            setattr(torch.cuda, name, value)
        yield


__all__ = ["CUDA", "NAME", "UUID", "cuda_api"]
