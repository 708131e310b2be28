"""The stages, the cheapest answer first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu.place import Place, Row


@dataclass(frozen=True)
class Stage:
    """rows: "module:function" of the place. answers: in a few words. seconds: predicted on an H100 or H200, with the
    start of the stage's process. asked: only where --only names it."""

    rows: str
    answers: str
    seconds: int
    asked: bool = False

    def function(self) -> Callable[[Place], Iterator[Row]]:
        module, _, name = self.rows.partition(":")
        found: Callable[[Place], Iterator[Row]] = getattr(importlib.import_module(module), name)
        return found


STAGES = {
    "gradients": Stage("bench.gpu.gradients:rows", "gradients of a small student and D against fp32 on the CPU", 60),
    "colocation": Stage("bench.gpu.colocation:rows", "holdings by turns: what the ledger learns, bytes a second", 40),
    "attention": Stage("bench.gpu.attention:rows", "packed attention beside SDPA and FlashAttention", 45),
    "head": Stage("bench.kernels.gpu:head", "the output head beside its products and its opponents", 75),
    "micro_batch": Stage("bench.gpu.micro_batch:rows", "a GRPO micro-batch of 3B: seconds, peak, the plan's peak", 110),
    "eager": Stage("bench.gpu.sampler:eager", "vLLM beside the trainer: sleep, wake, update, tokens/s", 85),
    "graphs": Stage("bench.gpu.sampler:graphs", "the same with CUDA graphs", 105),
    "opponents": Stage("bench.kernels.gpu:opponents", "the head beside everyone, in more rounds", 420, asked=True),
}
