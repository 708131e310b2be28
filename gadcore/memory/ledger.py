"""The ledger: who holds how many bytes of the device, and a limit that ends a run before the device does."""

from __future__ import annotations

from collections.abc import Mapping

from gadcore.errors import UserError

GIB = 2**30
# What the process itself takes: interpreter, libraries, the engine's bookkeeping.
PROCESS = "process"
# What an allocator keeps for later.
ALLOCATOR = "allocator"
# What a state computes with: activations, logits, temporary buffers. Known once a state has been seen.
WORK = "work"


class Ledger:
    """Bytes of the device by holder.

    limit: bytes that may be held at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: dict[str, int] = {}
        # state -> the most bytes above what is held that were seen in it.
        self.work: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def needed(self, work: int = 0) -> int:
        """Bytes in use where a state computes with `work`: it takes what the allocator keeps before anything new."""
        kept = self.held.get(ALLOCATOR, 0)
        return self.total - kept + max(work, kept)

    def update(self, held: Mapping[str, int]) -> None:
        """Takes over what the holders hold now; what is not named is as it was, 0 bytes take a holder out."""
        self.held = {name: size for name, size in (self.held | dict(held)).items() if size}

    def check(self, state: str) -> None:
        """UserError where the state, with what it needed to compute the last time, goes above the limit."""
        work = self.work.get(state, 0)
        if self.needed(work) <= self.limit:
            return
        raise UserError(f"state {state} {self.over(work)}")

    def over(self, work: int = 0) -> str:
        """What is held beside the limit, who holds it, and what to do about it."""
        holders = dict(self.held)
        if work and work >= holders.get(ALLOCATOR, 0):
            holders.pop(ALLOCATOR, None)
            holders[WORK] = work
        told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sorted(holders.items(), key=lambda i: -i[1]))
        return (
            f"needs {self.needed(work) / GIB:.2f} GiB of {self.limit / GIB:.2f} GiB allowed (GiB: {told}): "
            "set memory.offload, lower "
            "schedule.micro_batch_tokens, or use schedule.activation_checkpointing = full; memory.limit_gib is the "
            "limit"
        )

    def seen(self, state: str, peak: int) -> None:
        """Notes the most bytes that were in use in a state, with what is held now. UserError above the limit."""
        # What the allocator keeps now is what the state has computed with.
        work = peak - (self.total - self.held.get(ALLOCATOR, 0))
        self.work[state] = max(self.work.get(state, 0), work)
        self.check(state)
