"""The job that a process of a run is part of: one process alone, or all that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from gadcore.config.device import device_of
from gadcore.config.process import StopSignals
from gadcore.config.settings import Config
from gadcore.distributed.watch import Watch
from gadcore.distributed.world import World, join_world
from gadcore.record.run_folder import RunFolder, run_folder
from gadcore.train.agreement import agreed_stop, of_first, settled

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """config: the run's settings, with the mesh that the job has. notes: of that, in sentences. watch: None alone."""

    config: Config
    world: World
    notes: list[str]
    signals: StopSignals
    watch: Watch | None

    def of_first(self, make: Callable[[], T]) -> T:
        return of_first(self.world, make)

    def agreed_stop(self) -> Callable[[], str | None]:
        return agreed_stop(self.world, self.signals)

    def follows(self, where: Callable[[], tuple[str, int]]) -> None:
        """Tells from here on what this process is doing where another one asks; see Watch.where."""
        if self.watch is not None:
            self.watch.where = where

    @contextmanager
    def folder(self, config: Config) -> Iterator[RunFolder]:
        """The run's folder, which the first process holds and alone writes records into."""
        with ExitStack() as stack:
            folder: RunFolder | None = None
            with self.world.agreeing():
                if self.world.is_first:
                    folder = stack.enter_context(run_folder(config))
            path = self.world.broadcast_object(None if folder is None else folder.path)
            assert path is not None
            yield RunFolder(path) if folder is None else folder


def join_job(
    config: Config,
    signals: StopSignals,
    work: Callable[[Job], int],
    explain: Callable[[BaseException], tuple[str, int] | None],
) -> int:
    """What `work` returns in the job that this process was started in; of several, all end where one fails.

    explain: of an error that is to be told to the user, the sentence and the exit code.
    Raises UserError where the settings ask for other processes than there are.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config, notes = settled(config, processes)
    if processes == 1:
        return work(Job(config, World.alone(), notes, signals, None))
    signals.speaks_for = f"rank {os.environ['RANK']}"
    watch, mesh = Watch.join(), config.distributed
    code: int | None = None
    try:
        with join_world(device_of(config), timeout_s=mesh.timeout_s, replicas=mesh.replicate) as world:
            try:
                code = work(Job(config, world, notes, signals, watch))
                # Who leaves early takes the connections with him.
                world.barrier()
            except BaseException as error:
                # Before the connections go: the others are to know why.
                found = explain(error)
                code = watch.failed(error) if found is None else watch.told(*found)
                raise
    except BaseException as error:
        if code is None and explain(error) is None and not watch.ended:
            code = watch.failed(error)
        if code is None:
            raise
        return code
    watch.close()
    return code
