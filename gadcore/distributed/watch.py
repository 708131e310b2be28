"""The end of a job of several processes where one of them fails: all end, soon, and say what each was doing.

Collectives alone do not do that. A process that waits for one that has failed waits until its own connection tells it
so, or until a time is over, and then knows neither who failed nor why. So every process has a thread that writes what
it is doing into the job's store (torchrun's, which outlives them) and reads there whether one has failed:

    a sentence for the user (bad input, a full disk, memory, Ctrl-C)   printed once, all end with its exit code
    an error of the program     its traceback, and a line of every process: rank, host, phase, step, since when
    a process that is gone or hangs: who waits for it is told by its collective, at once or after distributed.timeout_s;
                                the same lines, and which processes do not answer

A process whose main thread does not come out by itself is ended by that thread, with its stack on standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal

import torch.distributed as dist

from gadcore.errors import cause
from gadcore.text import say

_PERIOD_S = 0.5
# What a process that has failed, or has been told so, is given to clean up before its thread ends it.
_GRACE_S = 5.0
# How long one that has lost its connections waits for a reason: whoever fails says so before it ends.
_REASON_S = 2.0
_STORE_S = 30.0
# Of gloo, which has no class of errors for it, of NCCL and of stores; and of World.agree().
_LOST = re.compile(r"gloo|[Cc]onnection (closed|reset|refused)|Broken pipe|Timed out waiting|^rank \d+ failed: ")


@dataclass(frozen=True)
class Failure:
    """The first failure of a job. told: text is a sentence for the user; failed: an error; lost: a process is gone.

    code: with which all processes end.
    """

    rank: int
    kind: Literal["told", "failed", "lost"]
    text: str
    code: int


@dataclass(frozen=True)
class Place:
    """What a process does: the phase of its run and the step, and how often it has said so."""

    host: str
    process: int
    phase: str
    step: int
    since: float
    beats: int

    def sentence(self, rank: int) -> str:
        lasted = f"{time.time() - self.since:.0f} s"
        return f"rank {rank} ({self.host}, process {self.process}): {self.phase}, step {self.step}, for {lasted}"


class Watch:
    """The thread of one process, and what its main thread asks when it ends.

    where: (phase, step) of this process's run; may be set when there is one. ended: whether this process has failed.
    """

    def __init__(self, rank: int, size: int, attempt: str) -> None:
        self.rank, self.size = rank, size
        self.where: Callable[[], tuple[str, int]] = lambda: ("setup", 0)
        self.ended = False
        # A connection of its own: that of the collectives may be waiting. Without torchrun the first process has the
        # store, for both.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=_STORE_S),
        )
        # A restarted job must not find the failure of the one before it.
        self._store = dist.PrefixStore(f"gadcore-watch/{attempt}", store)
        self._closed = threading.Event()
        self._seen: tuple[str, int] = ("", -1)
        self._since, self._beats = time.time(), 0
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    @staticmethod
    @cache
    def join() -> Watch:
        """The watch of this process, one of several that torchrun has started."""
        environment = os.environ
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Watch(int(environment["RANK"]), int(environment["WORLD_SIZE"]), attempt)

    def close(self) -> None:
        """This process ends as it should."""
        self._closed.set()
        self._thread.join(timeout=2 * _PERIOD_S)

    # What the main thread asks

    def told(self, text: str, code: int) -> int:
        """Ends with a sentence for the user, which one process prints; returns the exit code.

        Where all processes fail alike, the first one does; else the one that failed, and says that it is one of many.
        """
        if self.rank == 0:
            self._store.set("said", text)
        first = self._first(Failure(self.rank, "told", text, code))
        if self.rank == 0:
            if first.rank == 0 or first.text == text:
                _lines(text)
        elif first.rank == self.rank:
            end = time.monotonic() + _REASON_S
            while time.monotonic() < end and not self._store.check(["said"]):
                time.sleep(_PERIOD_S / 5)
            if not self._store.check(["said"]) or self._store.get("said").decode() != text:
                _lines(f"rank {self.rank} on {socket.gethostname()}: {text}")
        return first.code

    def failed(self, error: BaseException) -> int | None:
        """Ends with an error. The exit code where another process is the cause, and it has been told; None: it is this
        one's own, whose traceback is to be shown."""
        if _is_consequence(error):
            end = time.monotonic() + _REASON_S
            while time.monotonic() < end and self.failure() is None:
                time.sleep(_PERIOD_S / 5)
            first = self._first(Failure(self.rank, "lost", cause(error), 1))
            if first.rank == self.rank:
                self._tell_all(f"rank {self.rank} has lost another one: {first.text}")
            elif first.kind != "told":
                self._tell_own(first)
            return first.code
        first = self._first(Failure(self.rank, "failed", cause(error), 1))
        if first.rank == self.rank:
            self._tell_all(f"rank {self.rank} has failed: {first.text}")
        return None

    def failure(self) -> Failure | None:
        """The first failure of the job."""
        if not self._store.check(["failure"]):
            return None
        return Failure(**json.loads(self._store.get("failure")))

    def _first(self, mine: Failure) -> Failure:
        self.ended = True
        found = self._store.compare_set("failure", "", json.dumps(asdict(mine)))
        return Failure(**json.loads(found))

    # The thread

    def _watch(self) -> None:
        missed = 0
        while True:
            try:
                self._beat()
                failure = self.failure()
                missed = 0
            except Exception as error:
                missed += 1
                failure = None
                if missed * _PERIOD_S >= _GRACE_S:
                    failure = Failure(self.rank, "lost", f"the job's store is gone: {cause(error)}", 1)
            if failure is not None:
                self._end(failure)
                return
            if self._closed.wait(_PERIOD_S):
                return

    def _beat(self) -> None:
        place = self.where()
        if place != self._seen:
            self._seen, self._since = place, time.time()
        self._beats += 1
        mine = Place(socket.gethostname(), os.getpid(), *place, self._since, self._beats)
        self._store.set(f"place/{self.rank}", json.dumps(asdict(mine)))

    def _end(self, failure: Failure) -> None:
        """Leaves the main thread some time, and then ends the process."""
        end = time.monotonic() + _GRACE_S + _REASON_S
        while time.monotonic() < end:
            if self._closed.wait(_PERIOD_S):
                return
            with suppress(Exception):
                # Whoever tells what all are doing is to see that this one is there.
                self._beat()
        if failure.kind != "told":
            self._tell_own(failure)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        # It waits for a process that is gone, in code that nothing else ends.
        os._exit(failure.code)

    # What is printed

    def _tell_own(self, failure: Failure) -> None:
        phase, step = self.where()
        who = f"rank {failure.rank} failed" if failure.rank != self.rank else "the job failed"
        say(f"gadcore: rank {self.rank} ends in {phase}, step {step}: {who}: {failure.text}", sys.stderr)

    def _tell_all(self, text: str) -> None:
        """A line of every process, and whether it still answers."""
        say(f"gadcore: {text}", sys.stderr)
        self._beat()
        before = self._places()
        time.sleep(3 * _PERIOD_S)
        after = self._places()
        for rank in range(self.size):
            if (place := after.get(rank)) is None:
                say(f"gadcore: rank {rank}: has never answered", sys.stderr)
                continue
            silent = rank != self.rank and rank in before and before[rank].beats == place.beats
            say(f"gadcore: {place.sentence(rank)}{'; does not answer any more' if silent else ''}", sys.stderr)

    def _places(self) -> dict[int, Place]:
        found: dict[int, Place] = {}
        for rank in range(self.size):
            if self._store.check([f"place/{rank}"]):
                values: dict[str, Any] = json.loads(self._store.get(f"place/{rank}"))
                found[rank] = Place(**values)
        return found


def _is_consequence(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not come."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def _lines(text: str) -> None:
    # A list has a line an item.
    for line in f"gadcore: {text}".split("\n"):
        say(line, sys.stderr)
