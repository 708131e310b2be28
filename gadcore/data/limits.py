"""Limits on code that a file of the user's brings along: a chat template may loop for ever, or take all memory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL = 0.1
# Exit code of a copy of this process that ran out of the memory it was given.
_NO_MEMORY = 3


class TooLong(Exception):
    """What was limited took longer than it may."""


class TooLarge(Exception):
    """What was limited took more memory than it may."""


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


def tried(work: Callable[[], object], *, seconds: float, memory: int) -> None:
    """Calls work() in a copy of this process, of which nothing is left: what it returns or raises there is no matter.

    memory: bytes that it may take. Raises TooLong where it takes longer, also inside one operation (10**10**10), and
    TooLarge where it takes more memory or is killed. A system that is not Linux tries nothing: others do not limit a
    process's memory, or cannot be copied with their threads.
    """
    if sys.platform != "linux":
        return
    try:
        child = os.fork()
    except OSError:  # no process more: what is tried has to do without
        return
    if not child:
        _try(work, memory)
    try:
        status = _ended(child, time.monotonic() + seconds)
    except BaseException:
        _kill(child)
        raise
    if status is None:
        _kill(child)
        raise TooLong
    if status:
        raise TooLarge


def _try(work: Callable[[], object], memory: int) -> None:
    """In the copy, which ends here."""
    code = 0
    try:
        # The signals are this process's to see to.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + memory
        limits = [most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        work()
    except MemoryError:
        code = _NO_MEMORY
    except BaseException:
        code = 0
    finally:
        os._exit(code)


def _ended(child: int, deadline: float) -> int | None:
    """A process's status, None where it still runs at the deadline; 0 where somebody else has asked for it."""
    wait = 0.001
    while True:
        try:
            found, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            return 0
        if found:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(wait)
        wait = min(2 * wait, 0.05)


def _kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
