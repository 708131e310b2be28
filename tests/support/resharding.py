"""A small engine with tensor parallelism, and its loader as vLLM's are: fused, cut, padded. No process, no vLLM."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, MLP, VOCABULARY, PADDED = 12, 4, 2, 3, 10, 21, 24

SHAPES = {
    "embed.weight": (VOCABULARY, HIDDEN),
    "q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "q.bias": (HEADS * HEAD_DIM,),
    "k.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "k.bias": (KEY_HEADS * HEAD_DIM,),
    "v.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "v.bias": (KEY_HEADS * HEAD_DIM,),
    "o.weight": (HIDDEN, HEADS * HEAD_DIM),
    "gate.weight": (MLP, HIDDEN),
    "up.weight": (MLP, HIDDEN),
    "down.weight": (HIDDEN, MLP),
    "norm.weight": (HIDDEN,),
}


class Engine:
    """One rank's engine of `parallel`."""

    def __init__(self, rank: int, parallel: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.rank, self.parallel = rank, parallel
        key = max(1, KEY_HEADS // parallel) * HEAD_DIM
        query, mlp, rows = HEADS * HEAD_DIM // parallel, MLP // parallel, PADDED // parallel
        shapes = {
            "embed.weight": (rows, HIDDEN),
            "qkv.weight": (query + 2 * key, HIDDEN),
            "qkv.bias": (query + 2 * key,),
            "o.weight": (HIDDEN, query),
            "gate_up.weight": (2 * mlp, HIDDEN),
            "down.weight": (HIDDEN, mlp),
            "norm.weight": (HIDDEN,),
        }
        self.parameters = {
            name: torch.nn.Parameter(torch.full(shape, -7.0, dtype=dtype, device=device))
            for name, shape in shapes.items()
        }
        self._first = {"q": (0, query), "k": (query, key), "v": (query + key, key), "gate": (0, mlp), "up": (mlp, mlp)}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            part, kind = name.split(".")
            if part == "embed":
                target = self.parameters[name]
                mine = value[self.rank * len(target) : (self.rank + 1) * len(target)]
                target[: len(mine)].data.copy_(mine)
                target[len(mine) :].data.fill_(0)
            elif part in self._first:
                fused = self.parameters[f"{'qkv' if part in 'qkv' else 'gate_up'}.{kind}"]
                start, size = self._first[part]
                # Of key heads there may be fewer than ranks: some ranks have the same ones.
                at = self.rank // max(1, self.parallel // KEY_HEADS) if part in "kv" else self.rank
                fused.data.narrow(0, start, size).copy_(value.narrow(0, at * size, size))
            elif part in ("o", "down"):
                target = self.parameters[name]
                target.data.copy_(value.narrow(1, self.rank * target.shape[1], target.shape[1]))
            else:
                self.parameters[name].data.copy_(value)


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Whole weights of the trainer, float32."""
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
