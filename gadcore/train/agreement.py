"""What the processes of a run decide together: why it stops, what only the first one may find out, how they are cut."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gadcore.config.distributed import DistributedSettings
from gadcore.config.process import StopSignals
from gadcore.config.settings import Config
from gadcore.distributed.world import World
from gadcore.errors import UserError

T = TypeVar("T")


def of_first(world: World, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, on all; a UserError of it is everybody's. No collective inside."""
    made: Any = None
    with world.agreeing():
        if world.is_first:
            made = make()
    found: T = world.broadcast_object(made)
    return found


def agreed_stop(world: World, signals: StopSignals) -> Callable[[], str | None]:
    """StopSignals.reason() of all processes: a signal to one of them stops all after the same step."""
    if world.size == 1:
        return signals.reason

    def reason() -> str | None:
        came = torch.zeros(world.size, dtype=torch.int64)
        came[world.rank] = signals.received or 0
        found = world.sum_(came).tolist()
        ranks = [rank for rank, number in enumerate(found) if number]
        if not ranks:
            return None
        signals.received = found[ranks[0]]
        name = signal.Signals(found[ranks[0]]).name
        return name if len(ranks) == world.size else f"{name} to rank {', '.join(map(str, ranks))}"

    return reason


def settled(config: Config, processes: int) -> tuple[Config, list[str]]:
    """(the settings with the mesh that the job has, notes in sentences).

    What was chosen must be what torchrun has started; what a resumed run had gives way to it. UserError else.
    """
    asked = config.distributed
    shard, replicate = asked.shard or max(processes // asked.replicate, 1), asked.replicate
    notes = []
    if shard * replicate != processes:
        if processes > 1 and asked.model_fields_set & {"shard", "replicate"}:
            raise UserError(
                f"distributed.shard = {asked.shard} and distributed.replicate = {replicate} are not {processes} "
                f"processes, which torchrun has started: start shard x replicate processes, or leave shard at 0"
            )
        if processes > 1:
            notes.append(
                f"distributed.shard = {processes}, distributed.replicate = 1: {shard} x {replicate} is not the number "
                "of processes"
            )
        shard, replicate = processes, 1
    if processes == 1:
        # Alone nothing is cut.
        shard, replicate = (DistributedSettings.model_fields[name].default for name in ("shard", "replicate"))
    mesh = asked.model_copy(update={"shard": shard, "replicate": replicate})
    mesh.model_fields_set.intersection_update(set(asked.model_fields_set))
    return config.model_copy(update={"distributed": mesh}), notes


def notes_of(config: Config, world: World) -> list[str]:
    """What a user should know of a run of several processes, in sentences."""
    if world.size == 1:
        return []
    notes, size = [], config.schedule.batch_size
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and config.run.dir is None:
        notes.append(
            "torchrun may start this job anew (--max-restarts), which goes on with a run that --run.dir names, and "
            "begins another one without"
        )
    if size < world.size:
        notes.append(
            f"schedule.batch_size = {size} prompts are fewer than the {world.size} processes: some have no work in a "
            "step, and wait"
        )
    return notes


def facts_of(config: Config, world: World) -> dict[str, Any]:
    """For summary.json. Batches are those of the whole job: more processes take fewer prompts each."""
    if world.size == 1:
        return {}
    mesh = config.distributed
    return {
        "distributed": {
            "processes": world.size,
            "nodes": world.nodes,
            "shard": mesh.shard,
            "replicate": mesh.replicate,
            "prompts_of_a_step": config.schedule.batch_size,
            "prompts_of_a_process": config.schedule.batch_size / world.size,
        }
    }


def resumed_elsewhere(before: int, world: World) -> list[str]:
    """What differs where a checkpoint of other processes goes on."""
    if before == world.size:
        return []
    was, here = (f"{count} process{'es' if count > 1 else ''}" for count in (before, world.size))
    return [
        f"the checkpoint is one of {was}, the run goes on with {here}: sums are added in another order, so that it is "
        "the same run up to rounding, not to the bit"
    ]
