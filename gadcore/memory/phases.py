"""The phases of a run, and the seconds that each takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("setup", "rollout", "discriminator", "student", "evaluation", "checkpoint")


class Phases:
    """Marks which phase the run is in. Phases do not nest: one device, one phase at a time.

    seconds: total per phase since the run began (resumed runs go on counting).
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._step = dict.fromkeys(PHASES, 0.0)
        self._current: str | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name not in self.seconds:
            raise ValueError(f"unknown phase {name}: use one of {', '.join(PHASES)}")
        if self._current is not None:
            raise RuntimeError(f"phase {name} begins inside phase {self._current}")
        self._current = name
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed
            self._step[name] += elapsed
            self._current = None

    def take_step(self) -> dict[str, float]:
        """Seconds per phase since the last call, for the phases that took any."""
        taken = {name: s for name, s in self._step.items() if s > 0}
        self._step = dict.fromkeys(PHASES, 0.0)
        return taken
