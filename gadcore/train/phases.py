"""The phases of a run, the seconds that each takes, and the state of memory that each begins with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from gadcore.memory.colocation import Colocation
from gadcore.memory.holdings import NEEDS

PHASES = (
    "setup",
    *(state for state in NEEDS if state != "rest"),
    # A function of one's own, algorithm.reward.
    "rewards",
    "evaluation",
    "checkpoint",
)


class Phases:
    """Marks which phase the run is in. Phases do not nest: one device, one phase at a time.

    An evaluation alone has phases inside: they change who holds the device, and their time is the evaluation's.

    seconds: total per phase since the run began (resumed runs go on counting).
    memory: what holds the device when; a phase that is one of its states enters it. None: nobody minds.
    before_update: called as an optimizer's phase begins. on_begin: told of every phase that begins, but for those
    inside an evaluation.
    """

    memory: Colocation | None = None
    before_update: Callable[[], object] | None = None
    on_begin: Callable[[str], object] | None = None

    def __init__(self, on_span: Callable[[str, float, float], None] | None = None) -> None:
        """on_span: told of every phase at its end: name, start and end, both by time.perf_counter()."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._step = dict.fromkeys(PHASES, 0.0)
        self._current: str | None = None
        self._failed: str | None = None
        self._on_span = on_span

    @property
    def current(self) -> str | None:
        """The phase that is at work, or has failed."""
        return self._current or self._failed

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self._phase(name, self._state):
            yield

    @contextmanager
    def without_state(self, name: str) -> Iterator[None]:
        """A phase in which nothing is done on the device: whoever holds it keeps it."""
        with self._phase(name, lambda _: nullcontext()):
            yield

    @contextmanager
    def _phase(self, name: str, state: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
        if name not in self.seconds:
            raise ValueError(f"unknown phase {name}: use one of {', '.join(PHASES)}")
        if self._current == "evaluation" and name in NEEDS:
            with state(name):
                yield
            return
        if self._current is not None:
            raise RuntimeError(f"phase {name} begins inside phase {self._current}")
        if self.before_update is not None and name.endswith("_update"):
            self.before_update()
        if self.on_begin is not None:
            self.on_begin(name)
        self._current = name
        start = time.perf_counter()
        try:
            with state(name):
                yield
        except BaseException:
            self._failed = name
            raise
        finally:
            end = time.perf_counter()
            self.seconds[name] += end - start
            self._step[name] += end - start
            self._current = None
            if self._on_span is not None:
                self._on_span(name, start, end)

    @contextmanager
    def _state(self, name: str) -> Iterator[None]:
        with nullcontext() if self.memory is None else self.memory.explained():
            if self.memory is not None and name in NEEDS:
                self.memory.enter(name)  # type: ignore[arg-type]
            yield
            if self.memory is not None and name in NEEDS:
                self.memory.finish_work()

    def take_step(self) -> dict[str, float]:
        """Seconds per phase since the last call, for the phases that took any."""
        taken = {name: s for name, s in self._step.items() if s > 0}
        self._step = dict.fromkeys(PHASES, 0.0)
        return taken
