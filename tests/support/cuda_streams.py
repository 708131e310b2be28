"""torch.cuda's streams, events and host registration on a CPU: a copy on a side stream happens when somebody waits."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """Work in order, none of which is done before it is waited for."""

    def __init__(self, device: Any = None) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()

    def synchronize(self) -> None:
        self.run(len(self.work))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(Event().recorded(other))

    def wait_event(self, event: Event) -> None:
        self.work.append(event.synchronize)

    @property
    def pending(self) -> bool:
        return self.done < len(self.work)


class Present(Stream):
    """The stream that the tests compute on: whatever it waits for is done before the next line."""

    def wait_event(self, event: Event) -> None:
        event.synchronize()


class Event:
    def recorded(self, stream: Stream) -> Event:
        self.record(stream)
        return self

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.work)

    def synchronize(self) -> None:
        self.stream.run(self.place)


class _Later(TorchDispatchMode):
    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.stream.work.append(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


class FakeCuda:
    """What PinnedTier asks of torch.cuda. locked: bytes by address. fails: the code of the next registration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.present, self.locked, self.fails = Present(), {}, 0
        self.streams: list[Stream] = []
        self.recorded: list[torch.Tensor] = []
        for name, value in {
            "Stream": self._stream,
            "Event": Event,
            "stream": self._within,
            "current_stream": lambda device: self.present,
            "CudaError": lambda code: RuntimeError(f"out of memory ({code})"),
            "cudart": lambda: SimpleNamespace(cudaHostRegister=self._lock, cudaHostUnregister=self._unlock),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.recorded.append(tensor), raising=False
        )

    def _stream(self, device: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        with _Later(stream):
            yield

    def _lock(self, address: int, size: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0
        if not self.fails:
            self.locked[address] = size
        return self.fails

    def _unlock(self, address: int) -> int:
        assert not any(stream.pending for stream in self.streams), "a copy finds its memory unlocked"
        del self.locked[address]
        return 0
