"""Records: everything that a run writes down and shows, as one object, and a silent one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gadcore.config.settings import Config
from gadcore.record.health import HealthMonitor, watched
from gadcore.record.monitor import MachineMonitor
from gadcore.record.run_folder import RunFolder
from gadcore.record.trace import Trace
from gadcore.record.tracking import Row, Tracker, read_rows
from gadcore.record.view import View


class Records:
    """What a trainer says of its run. As it stands here nobody listens: for other ranks, for runs without a folder."""

    @property
    def episodes(self) -> Sequence[Any]:
        """The warnings of the run's health so far."""
        return ()

    def stage(self, name: str, steps: int) -> None:
        """A stage begins, of so many steps as far as is known."""

    def status(self, text: str) -> None:
        """What is going on from now on."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def message(self, text: str) -> None:
        """A sentence that stays."""

    def begin_step(self) -> None:
        """What lies between two steps, checkpoints and evaluations, is part of neither."""

    def step(self, place: Row, values: Mapping[str, float]) -> None:
        """A step's figures. place: stage, step, stage_step and stage_steps."""

    def sample(self, triplet: Row) -> None:
        """A prompt with the teacher's response and the student's best one."""

    def evaluation(self, name: str, result: Row, rows: list[Row]) -> None:
        """Held-out figures, and the rows that they are made of."""

    def summary(self, summary: Row) -> None:
        """The content of summary.json."""

    def finished(self, summary: Row) -> None:
        """Shows the summary, when all is written."""

    def go_on_after(self, step: int, config: Config) -> None:
        """Drops the records after a step: they will be made again."""


class RunRecords(Records):
    """metrics.jsonl, samples.jsonl and evaluations of a run folder, a tracker, a view, the machine, a trace, health."""

    def __init__(
        self,
        folder: RunFolder,
        view: View,
        tracker: Tracker,
        machine: MachineMonitor | None = None,
        trace: Trace | None = None,
        tiles: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """tiles: those that kernels have chosen so far, as gadcore.kernels.tiles.chosen_tiles() gives them."""
        self._tiles = tiles
        self.folder, self.view, self.tracker = folder, view, tracker
        self._machine, self._trace = machine, trace
        self._began = 0.0
        self._health = HealthMonitor()

    @property
    def episodes(self) -> Sequence[Any]:
        return self._health.episodes

    def stage(self, name: str, steps: int) -> None:
        self.view.stage(name, steps)

    def status(self, text: str) -> None:
        self.view.status(text)

    def phase(self, name: str) -> None:
        self.view.phase(name)

    def message(self, text: str) -> None:
        self.view.message(text)

    def begin_step(self) -> None:
        self._began = time.perf_counter()
        if self._machine is not None:
            self._machine.begin_step()

    def step(self, place: Row, values: Mapping[str, float]) -> None:
        values = dict(values)
        if self._machine is not None:
            values |= self._machine.take_step(values.get("tokens/sampled"))
        if self._trace is not None:
            where = {"step": place["step"], "stage_step": place["stage_step"]}
            self._trace.span(place["stage"], "steps", self._began, time.perf_counter(), **where)
        row = {**place, **values}
        # Before the row: a step that is recorded can be computed again.
        self.folder.keep_tiles(self._tiles())
        self.folder.step(row)
        self.tracker.log(values, place["step"])
        self.view.step(row)
        for warning in self._health.look(row):
            self.message(f"warning: {warning.title}. {warning.text}")

    def sample(self, triplet: Row) -> None:
        self.folder.samples.write(triplet)
        self.view.sample(triplet)

    def evaluation(self, name: str, result: Row, rows: list[Row]) -> None:
        self.folder.keep_tiles(self._tiles())
        self.folder.write_evaluation(name, rows)
        self.view.evaluation(name, result)

    def summary(self, summary: Row) -> None:
        self.folder.write_summary(summary)

    def finished(self, summary: Row) -> None:
        self.view.summary(summary)

    def go_on_after(self, step: int, config: Config) -> None:
        for log in (self.folder.metrics, self.folder.samples):
            if dropped := log.truncate_after(step):
                self.message(f"{log.path}: {dropped} lines after step {step} are dropped, they are made again")
        self.folder.keep_config(config, step)
        if self.folder.metrics.path.exists():
            self._health = watched(read_rows(self.folder.metrics.path))
