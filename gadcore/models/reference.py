"""The reference policy: the student as it was, which is never trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.distributed.fsdp import is_sharded, local
from gadcore.distributed.world import World
from gadcore.models.adapter import own_parameters
from gadcore.models.backbone import prune_as
from gadcore.models.fused import fuse_backbone
from gadcore.models.precision import of_products_alone
from gadcore.models.sharded import copy_sharded


def frozen_copy(
    model: PreTrainedModel, autocast: str, values: Mapping[str, Tensor] | None, world: World
) -> PreTrainedModel:
    """A model that computes as `model` does, without gradients; sharded where that one is.

    What autocast rounds in every pass is kept in its dtype: the same log-probs to the bit from half the memory.
    The base under adapters is the model's own: it never changes.
    values: of its own parameters by their names, of a sharded model this process's rows; default those that are there.
    """
    rounded = set() if autocast == "none" else of_products_alone(model)
    parameters = own_parameters(model)
    dtypes = {
        name: getattr(torch, autocast) if p in rounded and p.dtype == torch.float32 else p.dtype
        for name, p in parameters.items()
    }
    if values is None:
        values = {name: local(p.detach()) for name, p in parameters.items()}
    if is_sharded(model):
        frozen = copy_sharded(model, values, dtypes, world)
        fuse_backbone(frozen)
        prune_as(frozen, model)
        return frozen
    copies: dict[int, object] = {id(p): p for p in model.parameters()}
    for name, p in parameters.items():
        copies[id(p)] = nn.Parameter(values[name].to(p.device, dtypes[name], copy=True), requires_grad=False)
    return copy.deepcopy(model, copies)
