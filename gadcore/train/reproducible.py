"""What a run can promise: whether it would come out the same, to the bit, and what decides that."""

from __future__ import annotations

from typing import Any

from gadcore.config.settings import Config


def reproducible(config: Config, device: str, processes: int = 1) -> dict[str, Any]:
    """For summary.json. device: its type, "cpu" or "cuda". processes: of the job.

    resumed: a run that was stopped and goes on is the one that was not. new_run: so is another run of the same settings
    and data. why: sentences. Each on the same kind of machine with the same versions, and on a CPU with the same number
    of threads.
    """
    of_as_many = f"sums over {processes} processes have another order than over any other number"
    also = [of_as_many] if processes > 1 else []
    if device != "cuda":
        reason = "on a CPU every sum has an order that settings and data decide: the seed decides the rest"
        return {"resumed": True, "new_run": True, "why": [reason, *also]}
    # Only vLLM has it: the other engine draws prompt by prompt.
    draws_alone = config.rollout.engine == "hf" or getattr(config.rollout, "batch_invariant", False)
    why = [
        "the Triton kernels take the tiles that were fastest when first timed, and a sum goes another way in another "
        "tile: a resumed run takes those of its tiles.json, a new run may choose others"
    ]
    if not draws_alone:
        why.append(
            "vLLM computes a sample otherwise in another batch, and how its batches form depends on the memory that is "
            "free: rollout.batch_invariant = true keeps a sample apart from its batch, more slowly"
        )
    return {"resumed": draws_alone, "new_run": False, "why": [*why, *also]}
