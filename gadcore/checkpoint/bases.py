"""The frozen bases under a run's adapters: a checkpoint holds none of them, and says which they are.

Of every model with adapters: the base by its name and by a checksum of its bits, as they were loaded; what its matrices
are kept in; and what stands on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gadcore.errors import UserError
from gadcore.kernels.bits import bit_sums
from gadcore.kernels.quantised_linear import Bits, is_part, layers_of_bits
from gadcore.models.adapter import adapted_layers, base_parameters
from gadcore.rollout.weights import of_sums

Described = dict[str, Any]


def describe(models: Mapping[str, PreTrainedModel]) -> dict[str, Described]:
    """For JSON, by the names of the models; those without adapters are left out. Reads every base once."""
    return {name: _described(model) for name, model in models.items() if adapted_layers(model)}


def _described(model: PreTrainedModel) -> Described:
    layers = adapted_layers(model)
    first = next(iter(layers.values()))
    return {
        "base": model.config.name_or_path,
        "checksum": f"{of_sums(_sums(model)):032x}",
        "kept": next((bits.kind for layer in layers.values() if (bits := layer.bits)), "none"),
        "rank": first.rank,
        "scale": first.scale,
        "layers": sorted(layers),
    }


def _sums(model: nn.Module) -> dict[str, tuple[int, int]]:
    """bit_sums() of all weights of the base; of those in few bits, of what they were made of."""
    few = {f"{name}.weight": layer.bits for name, layer in layers_of_bits(model).items()}
    plain = {name: p for name, p in base_parameters(model).items() if name not in few and not is_part(name)}
    read = torch.stack([bit_sums(p) for p in plain.values()]).tolist()
    sums: dict[str, tuple[int, int]] = {name: (a, b) for name, (a, b) in zip(plain, read, strict=True)}
    return sums | {name: bits.sums for name, bits in few.items() if isinstance(bits, Bits)}


def check_equal(described: Sequence[Mapping[str, Described]]) -> None:
    """Raises UserError where processes that train one adapter have other bases under it. described: what describe()
    gave on every one of them, by rank."""
    for rank, theirs in enumerate(described):
        for owner, here in described[0].items():
            if here["checksum"] != theirs[owner]["checksum"]:
                raise UserError(
                    f"rank {rank} has loaded other weights for the base of the {owner} than rank 0, both from "
                    f"{here['base']}: give every node the same files"
                )


def check(saved: Mapping[str, Described] | None, here: Mapping[str, Described], names: Mapping[str, str]) -> None:
    """Raises UserError where adapters of a checkpoint do not belong on the bases that are here.

    saved: what describe() gave as it was written; None or without a model where all of it was trained. here: what it
    gives now. names: the models by what they were asked for.
    """
    for owner in names:
        theirs, ours = (saved or {}).get(owner), here.get(owner)
        if theirs is None and ours is None:
            continue
        if ours is None or theirs is None:
            had, has = ("lora", "none") if ours is None else ("none", "lora")
            raise UserError(
                f"the checkpoint is of a run with {owner}.adapter = {had}, this one has {owner}.adapter = {has}: keep "
                "that of the run"
            )
        # Written before there was a choice: none.
        kept = theirs.get("kept", "none")
        if kept != ours["kept"]:
            raise UserError(
                f"the checkpoint's adapters of the {owner} were trained on a base that is kept in {kept}, this run's "
                f"{owner}.adapter_base is {ours['kept']}: set {owner}.adapter_base = {kept}, as the run had"
            )
        if theirs["rank"] != ours["rank"]:
            raise UserError(
                f"the checkpoint's {owner} has adapters of rank {theirs['rank']}, this run's {owner}.adapter_rank is "
                f"{ours['rank']}: keep that of the run"
            )
        if theirs["scale"] != ours["scale"]:
            raise UserError(
                f"the checkpoint's {owner} has adapters with a scale of {theirs['scale']:g}, {owner}.adapter_alpha and "
                f"{owner}.adapter_rslora of this run make {ours['scale']:g}: keep those of the run"
            )
        if theirs["layers"] != ours["layers"]:
            name = min(set(theirs["layers"]) ^ set(ours["layers"]))
            where = "has one in the checkpoint alone" if name in theirs["layers"] else "has none in the checkpoint"
            raise UserError(
                f"the {owner}'s adapters stand beside other layers than the checkpoint's ({name} {where}): keep "
                f"{owner}.adapter_targets of the run"
            )
        if theirs["checksum"] != ours["checksum"]:
            raise UserError(
                f"the checkpoint's adapters of the {owner} were trained on the base {theirs['base']} with the checksum "
                f"{theirs['checksum']}, the weights of {names[owner]} have {ours['checksum']}: give the base of the "
                "run, in its dtype"
            )
