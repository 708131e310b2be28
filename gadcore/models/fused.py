"""A faster backbone with the same mathematics: by gadcore.models.fused_cuda on CUDA, by gadcore.cpu on a CPU.

Modules are known by their own classes, not by the model's name, and a norm or a rotation only where a probe gives what
its own code gives; one that is built in another way keeps its code.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from gadcore import cpu

Forward = Callable[[nn.Module, Tensor], Tensor]


def fuse_backbone(model: PreTrainedModel) -> int:
    """Replaces forward passes of norms, MLPs, linear layers and the rotation by faster ones; returns how many norms and
    MLPs.

    Parameters stay where they are. UserError where the package that CUDA needs is missing.
    """
    parts = _parts(model.device)
    if parts is None:
        return 0
    fused = 0
    for file in {type(module).__module__ for module in model.modules()}:
        _fuse_rotation(sys.modules[file], parts, model.device)
    for name, module in model.named_modules():
        # Products alone read this one, in every family that has it.
        forward = _norm(module, parts, read_by_products=name.endswith("input_layernorm")) or _mlp(module, parts)
        if forward is not None:
            fused += 1
        else:
            forward = parts.product(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
    return fused


def _parts(device: torch.device) -> Any:
    """The module of forward passes for a kind of device: norm(), norm_of(), mlp(), product(), rotates(), rotate()."""
    if device.type != "cuda":
        return cpu.parts()
    # It needs Triton, which not every machine has.
    from gadcore.models import fused_cuda

    return fused_cuda


def _norm(module: nn.Module, parts: Any, *, read_by_products: bool) -> Forward | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or eps is None:
        return None
    probe = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)[None]
    if isinstance(weight, DTensor):
        # A shard: whatever its rows are, the module computes the same with them.
        weight = torch.linspace(0.5, 1.5, len(weight), dtype=weight.dtype, device=weight.device)
        module = _with_weight(module, weight)
    with torch.no_grad():
        expected = module(probe)
        # Some families store weights around 1, some around 0: whichever gives the module's own result.
        for shift in (0.0, 1.0):
            if torch.allclose(parts.norm_of(probe, weight, eps=eps, shift=shift), expected, rtol=1e-2, atol=1e-5):
                return parts.norm(eps, shift, read_by_products)  # type: ignore[no-any-return]
    return None


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A module that computes as `module` does, with another weight."""
    other = copy.copy(module)
    other._parameters = {"weight": nn.Parameter(weight)}
    return other


def _mlp(module: nn.Module, parts: Any) -> Forward | None:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    known = type(module).__name__.endswith("MLP") and silu and all(isinstance(layer, nn.Linear) for layer in layers)
    return parts.mlp(module) if known else None


def _fuse_rotation(file: ModuleType, parts: Any, device: torch.device) -> None:
    """Rotates queries and keys by parts.rotate(), where a model's file has the usual function for it.

    The function is the file's: other models of the family in this process, on whatever device, rotate by it as well.
    """
    own = getattr(file, "apply_rotary_pos_emb", None)
    if own is None or not parts.rotates() or parts.rotate in _ways(own):
        return
    q, k = torch.linspace(-1, 2, 48).view(1, 2, 3, 8), torch.linspace(-3, 1, 24).view(1, 1, 3, 8)
    cos, sin = torch.linspace(-1, 1, 24).view(1, 3, 8), torch.linspace(2, 0, 24).view(1, 3, 8)
    given = [tensor.to(device) for tensor in (q, k, cos, sin)]
    try:
        expected = own(*given)
    except (TypeError, RuntimeError):
        # It takes something else.
        return
    usual = isinstance(expected, tuple) and len(expected) == 2
    if usual and all(map(partial(torch.allclose, atol=1e-5), expected, parts.rotate(own, *given))):
        file.apply_rotary_pos_emb = partial(parts.rotate, own)  # type: ignore[attr-defined]


def _ways(rotation: Any) -> list[Any]:
    """The functions that a rotation tries before the file's own: one for each kind of device in use."""
    ways = []
    while isinstance(rotation, partial):
        ways.append(rotation.func)
        rotation = rotation.args[0]
    return ways


def embed_in_place(model: PreTrainedModel) -> bool:
    """Lets the gradient of the token embedding be added to what is there already, where gadcore.cpu can."""
    return model.device.type == "cpu" and cpu.embed_in_place(model)


def gradient_in_place(weight: Tensor, autocast: str) -> Tensor | None:
    """The gradient that an earlier pass has left of an output head, where the next one can be added to it."""
    return cpu.gradient_in_place(weight, autocast) if weight.device.type == "cpu" else None


# What the backward pass makes again for next to nothing; nothing on CUDA, where Liger's functions do so themselves.
Recomputables, recomputing = cpu.Recomputables, cpu.recomputing
