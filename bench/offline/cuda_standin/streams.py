"""Streams and events of the stand-in's GPU.

What it assumes of CUDA's stream semantics (CUDA C++ Programming Guide, "Asynchronous Concurrent Execution"; torch's
notes on CUDA semantics):
- work of one stream runs in the order of its submission, that of two streams in any order but where one waits for the
  other. So that a wait that is missing shows, a copy on a stream of its own runs as late as it may: when somebody waits
  for it;
- a copy into page-locked memory that does not block is done when its stream has been synchronised, not before, and
  reads what its source held at its place in the stream;
- memory that is freed while another stream still works with it may be given to somebody else, unless record_stream()
  said so: here that is an error.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any


class FreedInFlight(RuntimeError):
    """Memory was given back while a copy on another stream was still to read or write it."""


class Work:
    """A copy that has been submitted. run: does it; uses: the storages that it reads or writes."""

    def __init__(self, what: str, run: Callable[[], None], uses: list[Any]) -> None:
        self.what, self.run = what, run
        self._uses = [weakref.ref(storage) for storage in uses]

    def finish(self) -> None:
        if any(use() is None for use in self._uses):
            raise FreedInFlight(
                f"{self.what}: its memory was freed before the copy ran, and no record_stream() kept it"
            )
        self.run()


class Stream:
    """A queue of copies that have not run yet."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device, self.priority = device, priority
        self._work: list[Work] = []
        self._kept: list[Any] = []
        self.cuda_stream = id(self)

    def submit(self, work: Work) -> Event:
        self._work.append(work)
        return self.record_event()

    def keep(self, storage: Any) -> None:
        """record_stream(): the memory is not given away before what is submitted now has run."""
        if self._work:
            self._kept.append(storage)

    def run(self, until: int | None = None) -> None:
        """Runs what was submitted, as far as the work with this number."""
        done = len(self._work) if until is None else until
        now, self._work = self._work[:done], self._work[done:]
        for work in now:
            work.finish()
        if not self._work:
            self._kept.clear()

    def synchronize(self) -> None:
        self.run()

    def wait_stream(self, other: Stream) -> None:
        other.run()

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self._work


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self._stream: Stream | None = None
        self._pending: list[Work] = []
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = current[-1] if stream is None else stream
        self._stream, self._pending = stream, list(stream._work)
        self._at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        if self._stream is None:
            return
        left = [work for work in self._stream._work if work in self._pending]
        self._stream.run(len(left))

    def query(self) -> bool:
        return self._stream is None or not any(work in self._pending for work in self._stream._work)

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds."""
        return (other._at - self._at) * 1e3


# The stream of the thread, innermost last; the first is the default one.
current: list[Stream] = [Stream()]
