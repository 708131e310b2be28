"""What could come out in another way the next time, among what a block of code dispatches.

Of everything that is dispatched, what torch lists as nondeterministic on CUDA is looked at: writes to places that are
all different are the same in any order.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.kernels.ops import OPS

# torch.use_deterministic_algorithms() as of torch 2.13, by what is dispatched. These write by atomics, or whichever
# comes last, and are looked at: op -> (position of the index, of what is written, whether it is added).
INDEXED = {
    "index_add": (2, 3, True),
    "index_add_": (2, 3, True),
    "index_copy": (2, 3, False),
    "index_copy_": (2, 3, False),
    "scatter": (2, 3, False),
    "scatter_": (2, 3, False),
    "scatter_add": (2, 3, True),
    "scatter_add_": (2, 3, True),
}
# And these must not occur at all. Not among them: embedding_dense_backward, which sorts its indices on CUDA or takes
# turns (aten/src/ATen/native/cuda/Embedding.cu), and segment_reduce, whose segments have a thread each.
NEVER = re.compile(
    r"(adaptive_avg_pool|adaptive_max_pool|avg_pool3d|fractional_max_pool|max_unpool|max_pool3d|reflection_pad|"
    r"replication_pad|upsample_|grid_sampler|nll_loss|_ctc_loss|_embedding_bag|embedding_bag|histc|bincount|median|"
    r"put_?$|index_put|_index_put_impl|scatter_reduce|index_reduce|_cudnn|convolution|kthvalue)"
)


class Looked(TorchDispatchMode):
    """found: what may come out in another way the next time. ops: how often each op was dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        self.ops[f"{namespace}::{name}"] += 1
        if namespace == "aten":
            if NEVER.match(name):
                self.found.append(name)
            elif name in INDEXED and isinstance(args[INDEXED[name][1]], Tensor):
                self._look(name, args)
            elif name == "cumsum" and args[0].is_floating_point():
                self.found.append("cumsum of floating point")
        return func(*args, **(kwargs or {}))

    def _look(self, name: str, args: Any) -> None:
        at, source, added = INDEXED[name]
        index, written = args[at], args[source]
        if index.dim() > 1:
            # Along one dimension: places that differ elsewhere are different ones.
            rows = index.movedim(args[1], 0).flatten(1).sort(0).values
            repeated = bool((rows[1:] == rows[:-1]).any())
        else:
            places, counts = index.unique(return_counts=True)
            several = torch.isin(index, places[counts > 1])
            rows = written.movedim(args[1], 0)[several]
            # Any number of zeros is 0 in any order.
            repeated = bool(several.any()) and not (added and not rows.any())
        if repeated:
            self.found.append(f"{name} into {list(args[0].shape)} with repeated places")


def known(ops: Counter[str]) -> bool:
    """Whether everything that is not torch's own is in the table of ops, whose kernels have no atomics."""
    ours = {op.removeprefix("gadcore::").removesuffix("_backward") for op in ops if op.startswith("gadcore::")}
    return ours <= set(OPS) and all(op.startswith(("aten::", "gadcore::", "profiler::")) for op in ops)
