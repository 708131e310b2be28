"""In which precision the products of both models compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Products in `dtype` inside the block; "none" leaves everything as it is.

    Casts of the weights are not kept: every matrix is read once in a pass, a cache would hold a second copy of all of
    them until the block ends, and what checkpointing computes again, outside of the block, would not find it.
    """
    if dtype == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype), cache_enabled=False)


def of_products_alone(model: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters that nothing but linear layers have: autocast casts these, no norm and no table of embeddings.

    An output head that is the embedding as well is none of them.
    """
    owned: dict[bool, set[nn.Parameter]] = {True: set(), False: set()}
    for module in model.modules():
        owned[type(module) is nn.Linear].update(module.parameters(recurse=False))
    return owned[True] - owned[False]
