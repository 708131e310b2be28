"""A limit on the time of code that a file of the user's brings along: a chat template may loop for ever."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_POLL = 0.1


class TooLong(Exception):
    """What was limited took longer than it may."""


class _Watch:
    """A thread that raises TooLong in every thread that is past its deadline.

    No signal: those reach the main thread alone, and whoever embeds gadcore may use the alarm himself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._busy = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds
            # A forked process has none.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="gadcore-limits", daemon=True)
                self._thread.start()
        self._busy.set()

    def end(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._deadlines.pop(me, None) is None:
                # Raised by _run(), and perhaps not delivered yet.
                _raise_in(me, None)

    def _run(self) -> None:
        while self._busy.wait():
            time.sleep(_POLL)
            with self._lock:
                if not self._deadlines:
                    self._busy.clear()
                for thread, deadline in list(self._deadlines.items()):
                    if time.monotonic() > deadline:
                        del self._deadlines[thread]
                        _raise_in(thread, TooLong)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


_watch = _Watch()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block where it takes longer; Python code alone can be stopped so. Blocks must not nest."""
    _watch.begin(seconds)
    try:
        yield
    finally:
        _watch.end()
