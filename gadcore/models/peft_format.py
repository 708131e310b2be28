"""Adapters as the package peft stores them: adapter_config.json and adapter_model.safetensors in a folder.

peft, transformers' load_adapter() and vLLM's LoRARequest read them; peft itself is not needed here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.config.adapter import LoRA
from gadcore.errors import UserError, foreign
from gadcore.kernels.lora_linear import is_adapters
from gadcore.models.adapter import adapted_layers, own_parameters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a wrapped model's parameters are called there, and what stands behind the name of an adapter's.
_PREFIX, _SUFFIX = "base_model.model.", ".weight"
# Kinds of adapters that compute something else, by the key of adapter_config.json and what switches them off.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
}


def write_adapter(model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapters of a model, and what else of it is trained, to a folder that is there.

    weights: of own_parameters(), where they wait elsewhere. They are written in their dtype.
    """
    layers = adapted_layers(model)
    own = own_parameters(model)
    first = next(iter(layers.values()))
    heads = sorted({name.partition(".")[0] for name in own if not is_adapters(name)})
    tensors = {
        f"{_PREFIX}{name}{_SUFFIX if is_adapters(name) else ''}": (weights or own)[name].detach().cpu().contiguous()
        for name in own
    }
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path,
        "r": first.rank,
        # Of a plain scale, whichever made it: alpha / r.
        "lora_alpha": first.scale * first.rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        # In full: another layer of the model may end in the same word.
        "target_modules": sorted(layers),
        "modules_to_save": heads or None,
        "inference_mode": True,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def read_lora(lora: LoRA, settings: Any, owner: str) -> LoRA:
    """What an adapter is that starts from lora.start: as that folder says. settings: of the model, `owner` by name.

    Raises UserError where the folder holds none, one that computes something else, or another than the settings say.
    """
    folder = Path(str(lora.start))
    what = f"{owner}.adapter_from = {lora.start}"
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{what} is no folder of an adapter: it has no {CONFIG}")
    with foreign(f"cannot read {path}"):
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    if kind != "LORA":
        raise UserError(f"{what} holds an adapter of the kind {kind}: only LORA can be trained on")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"{what} holds an adapter with {key} = {config[key]!r}, which computes something else than "
                "W + s B A: give a plain LoRA adapter of one rank"
            )
    found = LoRA(rank, alpha, _targets(config.get("target_modules")), bool(config.get("use_rslora")), lora.start)
    asked = {
        "rank": (settings.adapter_rank, found.rank),
        "alpha": (settings.adapter_alpha, found.alpha),
        "rslora": (settings.adapter_rslora, found.rslora),
    }
    for key, (setting, theirs) in asked.items():
        if setting is not None and setting != theirs:
            raise UserError(
                f"{owner}.adapter_{key} = {setting} is not that of {what}, {theirs}: leave {owner}.adapter_{key} out"
            )
    if settings.adapter_targets is not None:
        raise UserError(f"{what} says which layers have an adapter: leave {owner}.adapter_targets out")
    return found


def _targets(value: Any) -> tuple[str, ...]:
    # A pattern, or "all-linear": the tensors themselves say which layers there are.
    return tuple(value) if isinstance(value, list) else ()


def layers_of(start: str, owner: str) -> list[str]:
    """The layers that the adapter in the folder `start` stands beside."""
    names = (_our_name(key) for key in _tensors(start, owner))
    return sorted({name.rpartition(".")[0] for name in names if is_adapters(name)})


@torch.no_grad()
def load_adapter(model: PreTrainedModel, start: str, owner: str) -> None:
    """Gives the model's adapters, and a head that is stored beside them, the values in the folder `start`.

    Raises UserError unless every adapter gets its values and every tensor of the folder has a place.
    """
    own = own_parameters(model)
    tensors = {_our_name(key): tensor for key, tensor in _tensors(start, owner).items()}
    what = f"{owner}.adapter_from = {start}"
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(f"{what} holds {name}, for which the {owner} has no place: was it made for another model?")
        if own[name].shape != tensor.shape:
            raise UserError(
                f"{what} holds {name} as {list(tensor.shape)}, the {owner}'s is {list(own[name].shape)}: was it made "
                "for another model?"
            )
    if missing := sorted(name for name in own if is_adapters(name) and name not in tensors):
        raise UserError(f"{what} lacks {missing[0]} ({len(missing)} such tensors): it is not whole")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _tensors(start: str, owner: str) -> dict[str, Tensor]:
    path = Path(start) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{owner}.adapter_from = {start} has no {WEIGHTS}: adapters are read as safetensors alone")
    with foreign(f"{path} is damaged", "download it anew"):
        return load_file(path)


def _our_name(key: str) -> str:
    name = key.removeprefix(_PREFIX)
    stem = name.removesuffix(_SUFFIX)
    return stem if is_adapters(stem) else name


def resolved(lora: LoRA | None, settings: Any, owner: str) -> LoRA | None:
    """An adapter with what its folder says, where it starts from one: the layers by their full names."""
    if lora is None or lora.start is None:
        return lora
    found = read_lora(lora, settings, owner)
    return dataclasses.replace(found, targets=tuple(layers_of(lora.start, owner)))
