"""The trainer's shards in vLLM's, where vLLM samples on the trainer's own ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.distributed.reshard import Layout, make_plan, mesh_of
from gadcore.distributed.reshard_blocks import find_blocks
from gadcore.distributed.reshard_exchange import Exchange, Moved
from gadcore.distributed.reshard_sums import differing, engine_sums, trainer_sums
from gadcore.distributed.world import World


class ShardedWeights:
    """vLLM's parameters on this rank, which is one of several: slices of tensor parallelism, or whole.

    Made while vLLM has the weights of the directory; asks the model's own loader where they come from. All ranks call
    everything together. moved: what the last update took on this rank; None before the first.
    """

    def __init__(self, engine_model: nn.Module, model: PreTrainedModel, world: World) -> None:
        """model: the trainer's; its values are not looked at, they may be away."""
        self._world = world
        self._parameters = dict(engine_model.named_parameters())
        trainers = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in trainers.items()}
        blocks = find_blocks(engine_model.load_weights, self._parameters, shapes)  # type: ignore[arg-type]
        (mesh,) = {mesh_of(p, name) for name, p in trainers.items()}
        self._layout = Layout(
            mesh,
            shapes,
            {name: p.dtype for name, p in trainers.items()},
            {name: p.dtype for name, p in self._parameters.items()},
            world.all_gather_objects(blocks),
        )
        self.plan = make_plan(self._layout, world.rank)
        self._exchange = Exchange(self.plan, self._parameters)
        self._loaded = engine_sums(self._layout, world, self._parameters)
        self.moved: Moved | None = None

    def match(self, model: PreTrainedModel) -> None:
        """Raises RuntimeError where vLLM did not load what the trainer has."""
        if wrong := self._differing(_detached(model), self._loaded):
            raise RuntimeError(f"vLLM did not load the trainer's {wrong[0]}, or not to where it was looked for")

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """vLLM has the trainer's weights from here on; RuntimeError where its fingerprint is another."""
        pairs = list(weights)
        self.moved = self._exchange.push(pairs)
        if wrong := self._differing(pairs, engine_sums(self._layout, self._world, self._parameters)):
            raise RuntimeError(
                f"vLLM's weights differ from the trainer's after an update, in {len(wrong)} parameters, of which "
                f"{wrong[0]} is the first"
            )

    def _differing(self, weights: Iterable[tuple[str, Tensor]], found: Tensor) -> list[str]:
        layout = self._layout
        expected = trainer_sums(layout.shapes, layout.stored, layout.mesh, self._world, weights)
        return differing(list(layout.shapes), expected, found)

    def own(self) -> list[Tensor]:
        """vLLM's parameters on this rank."""
        return list(self._parameters.values())

    def named(self) -> dict[str, Tensor]:
        raise RuntimeError("no rank has whole weights to be asked for by the trainer's names")


def _detached(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    with torch.no_grad():
        return [(name, p.detach()) for name, p in model.named_parameters()]
