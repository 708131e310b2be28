"""The settings of `distributed`. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from gadcore.config.kinds import Above, NonNegative, Positive, Section


class DistributedSettings(Section):
    """The processes that torchrun starts (docs/guide/distributed.md)."""

    shard: NonNegative = Field(
        0,
        description="Processes that every model, or every copy of it, is cut over (FSDP2); 0: as many as there are. "
        "One with an adapter is cut over none: each process has all of it.",
    )
    replicate: Positive = Field(
        1, description="Whole copies of the sharded models (HSDP), one a node: shard x replicate are all processes."
    )
    timeout_s: Above = Field(
        1800.0, description="Seconds that a process waits for the others before the job ends as failed."
    )
