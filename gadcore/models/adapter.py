"""Low-rank adapters on the frozen weights of a model: where they are put, what these weights are kept in, and which
parameters are whose."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.config.adapter import Adaptable, LoRA
from gadcore.errors import UserError
from gadcore.kernels.lora_linear import LoRALinear
from gadcore.kernels.quantised import Kind
from gadcore.kernels.quantised_linear import QuantisedLinear, layers_of_bits, plain_weight
from gadcore.models.shallow import decoder_layers


def add_adapter(model: PreTrainedModel, lora: LoRA, dtype: torch.dtype, *, owner: str, seed: int = 0) -> list[str]:
    """Freezes all parameters of the model, puts an adapter of `dtype` beside its target layers; returns their names.

    owner: what the model is called in settings, "student" or "discriminator"; with the seed it decides A, B is zero.
    Raises UserError where a target is no linear layer of the model's decoder layers.
    """
    linears = _linears(model)
    for target in lora.targets:
        if not any(_named(name, target) for name in linears):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
            raise UserError(
                f"{owner}.adapter_targets names {target}, which is no linear layer of the decoder layers of "
                f"{model.config.model_type}: there are {there}"
            )
    chosen = [name for name in linears if not lora.targets or any(_named(name, target) for target in lora.targets)]
    if not chosen:
        raise UserError(
            f"the decoder layers of {model.config.model_type} have no linear layer for an adapter to stand beside: "
            f"set {owner}.adapter = none"
        )
    model.requires_grad_(False)
    # Not hash(): that is another one in every process.
    digest = hashlib.blake2b(f"{seed} {owner}".encode(), digest_size=6).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    for name in chosen:
        adapted = LoRALinear(linears[name], lora.rank, lora.scale, dtype)
        adapted.draw(generator)
        model.set_submodule(name, adapted)
    return chosen


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    plain = (nn.Linear, QuantisedLinear)
    return {n: m for n, m in model.named_modules() if id(m) in inside and type(m) in plain}


def loaded_on(settings: Adaptable, device: torch.device, owner: str) -> torch.device:
    """Where a model's weights are to be loaded: on the device, or where they will be quantised for it in host memory,
    since a GPU may have no room for all of them. UserError where the device cannot read them then."""
    if settings.adapter_base == "none":
        return device
    if device.type == "cuda" and settings.adapter_base == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError(
            f"{owner}.adapter_base = nf4 needs the package bitsandbytes on a GPU: pip install 'gadcore[nf4]', or set "
            f"{owner}.adapter_base = int8"
        )
    return torch.device("cpu")


def quantise_base(model: PreTrainedModel, settings: Adaptable, device: torch.device, owner: str) -> None:
    """Keeps the matrices of the decoder layers as `adapter_base` says, one by one, and brings all of the model to the
    device. Embeddings, norms, biases and the head stay as they are. UserError for a matrix that cannot be kept so."""
    if settings.adapter_base == "none":
        return
    for name, linear in _linears(model).items():
        if settings.adapter_base == "nf4" and linear.in_features % 2:
            raise UserError(
                f"{owner}.adapter_base = nf4 keeps two entries of a row in a byte, and {name} has rows of "
                f"{linear.in_features}: set {owner}.adapter_base = int8"
            )
        model.set_submodule(name, QuantisedLinear(linear, cast(Kind, settings.adapter_base), device))
    nn.Module.to(model, device)


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name -> layer, of all layers with an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are the model's own: all of them, or where it has adapters these and what else
    is trained beside them, such as the discriminator's head. The others are its base's, which others may share.
    """
    layers = adapted_layers(model).values()
    adapters = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    return {name: p for name, p in model.named_parameters() if not adapters or id(p) in adapters or p.requires_grad}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of the frozen base under a model's adapters; empty for a model without."""
    own = own_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in own}


def whole_weight(layer: nn.Linear, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that a layer computes with, its adapter added where it has one, as a plain matrix of `dtype`; default
    that of the base's weights."""
    if isinstance(layer, LoRALinear):
        return layer.merged().to(dtype or layer.plain_dtype)
    return plain_weight(layer).to(dtype)


def merge_adapter(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes plain layers of those with an adapter: W + s B A, added up in float32, then cast to `dtype` once; default
    that of W; and of those that are kept in few bits. The model shares these weights with nobody then."""
    for name, layer in {**layers_of_bits(model), **adapted_layers(model)}.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(whole_weight(layer, dtype), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
