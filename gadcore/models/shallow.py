"""A model of a few of its own layers, for probes: what holds for a layer of each kind holds for all of them.

A model of 80 layers takes seconds to run, and one that is sharded over devices is whole nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.data.groups import GroupedBatch, GroupTokens


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the backbone, in order."""
    return model.base_model.layers  # type: ignore[return-value]


@contextmanager
def shallow(model: PreTrainedModel, count: int | None = None) -> Iterator[None]:
    """Inside, the model consists of some of its layers: the first of every kind, and the last one.

    count: the first so many layers instead.
    """
    backbone, layers, config = model.base_model, decoder_layers(model), model.config.get_text_config()
    chosen = list(range(len(layers)))[:count] if count is not None else _one_of_each_kind(layers)
    kinds = getattr(config, "layer_types", None)
    before = config.num_hidden_layers
    try:
        backbone.layers = nn.ModuleList(layers[i] for i in chosen)
        config.num_hidden_layers = len(chosen)
        if kinds is not None:
            config.layer_types = [kinds[i] for i in chosen]
        yield
    finally:
        backbone.layers = layers
        config.num_hidden_layers = before
        if kinds is not None:
            config.layer_types = kinds


def _one_of_each_kind(layers: nn.ModuleList) -> list[int]:
    """Positions, two at least where there are two. Kinds differ in modules, and in the flags of their attention."""
    first: dict[object, int] = {}
    for i, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", layer)
        flags = {
            name: value
            for name, value in vars(attention).items()
            if isinstance(value, bool | int | float | str | None) and name not in ("layer_idx", "training")
        }
        modules = tuple(type(module).__name__ for module in layer.modules())
        kind = (getattr(layer, "attention_type", None), modules, tuple(sorted(flags.items())))
        first.setdefault(kind, i)
    return sorted({*range(min(2, len(layers))), *first.values(), *range(len(layers))[-1:]})


def probe_batch(model: PreTrainedModel) -> GroupedBatch:
    """Two small ragged groups."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [1 + 7 * i % (vocabulary - 1) for i in range(64)]
    groups = [
        GroupTokens(tuple(ids[:9]), (tuple(ids[9:14]), tuple(ids[20:28]))),
        GroupTokens(tuple(ids[30:33]), (tuple(ids[33:40]), (ids[40],))),
    ]
    return GroupedBatch.of(groups, last_tokens=True, device=model.device)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a probe are equal up to the rounding of their dtype."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(a.dtype, 0.1)
    return a.shape == b.shape and bool(((a - b).norm() <= tolerance * b.norm()).item())
