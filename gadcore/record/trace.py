"""trace.json: what a run did when, in the JSON trace format that ui.perfetto.dev and chrome://tracing open.

Events are written one by one and the format needs no closing bracket, so the trace of a killed run loads too. A resumed
run goes on in the same file, on the same time line: times in it are microseconds since 1970.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

# Constant, so that a resumed run goes on in the same tracks.
PID = 1
TAIL_BYTES = 1 << 16


class Trace:
    """Writes a trace; times are seconds of time.perf_counter(). May be used from several threads.

    Raises OSError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        """Goes on with the trace in `path` where there is one; what a crash tore off at its end is dropped."""
        self._lock = threading.Lock()
        self._epoch = time.time() - time.perf_counter()
        self._tracks: set[str] = set()
        self._file, self._empty = _open(path)
        self._event("process_name", "M", args={"name": "gadcore"})

    def span(self, name: str, track: str, start: float, end: float, **args: Any) -> None:
        """Something that took from start to end. Spans of one track must follow each other or nest.

        args: what a click on it shows, as JSON values.
        """
        tid = self._tid(track)
        self._event(name, "X", ts=self._at(start), dur=round((end - start) * 1e6, 3), tid=tid, args=args)

    def phase(self, name: str, start: float, end: float) -> None:
        """A phase of the run, as Phases reports it."""
        self.span(name, "phases", start, end)

    def copy(self, what: str, start: float, end: float, size: int) -> None:
        """A holding of `size` bytes that moved, as Colocation reports it."""
        self.span(what, "copies", start, end, bytes=size)

    def counter(self, name: str, when: float, values: Mapping[str, float]) -> None:
        """Values at one time, each drawn as a curve of its own, on a scale of its own."""
        self._event(name, "C", ts=self._at(when), args=dict(values))

    def close(self) -> None:
        """Ends the file; may be called twice."""
        with self._lock:
            if not self._file.closed:
                self._file.write(b"\n]\n")
                self._file.close()

    def _at(self, seconds: float) -> float:
        return round((self._epoch + seconds) * 1e6, 3)

    def _tid(self, track: str) -> int:
        # From the name alone: a resumed run may meet its tracks in another order.
        tid = zlib.crc32(track.encode()) & 0x7FFFFFFF
        if track not in self._tracks:
            self._tracks.add(track)
            self._event("thread_name", "M", tid=tid, args={"name": track})
        return tid

    def _event(self, name: str, kind: str, **fields: Any) -> None:
        line = json.dumps({"name": name, "ph": kind, "pid": PID, **fields}).encode()
        with self._lock:
            # A thread that outlived close() has nothing to write any more.
            if not self._file.closed:
                # The comma comes first: whatever is on disk then ends with a whole event.
                self._file.write((b"[\n" if self._empty else b",\n") + line)
                self._file.flush()
                self._empty = False


def _open(path: Path) -> tuple[BinaryIO, bool]:
    """The file, positioned behind its last whole event, and whether it holds none."""
    file = path.open("r+b") if path.exists() else path.open("wb")
    size = file.seek(0, 2)
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read() if size else b""
    # Every event is a line of its own, and the comma behind it belongs to the next one.
    while tail and not _is_event(tail.rpartition(b"\n")[2]):
        tail = tail.rpartition(b"\n")[0].rstrip(b",")
    file.seek(max(0, size - TAIL_BYTES) + len(tail))
    file.truncate()
    return file, not tail


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
