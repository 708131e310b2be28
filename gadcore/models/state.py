"""What a model and its optimizer are made of as named tensors, and how these get back into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gadcore.errors import UserError


@runtime_checkable
class OnDisk(Protocol):
    """Saved tensors that lie in pieces, in files of several processes: a reader takes what it holds of each.

    facts(): shape and dtype of every tensor as a whole. read_into(): fills targets of the same names and shapes.
    """

    def facts(self) -> dict[str, tuple[torch.Size, torch.dtype]]: ...
    def read_into(self, targets: Mapping[str, Tensor]) -> None: ...


def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: str) -> None:
    """Copies a checkpoint's tensors into the parameters of these names, as check_parameters() allows it."""
    check_parameters(parameters, tensors, model)
    copy_into(parameters, tensors)


def check_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: str) -> None:
    """Raises UserError where the parameters have other names or shapes than a checkpoint's tensors.

    model: "student" or "discriminator", for the message.
    """
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = {name: tuple(shape) for name, (shape, _) in facts(tensors).items()}
    if here != saved:
        name = min(name for name in here.keys() | saved.keys() if here.get(name) != saved.get(name))
        raise UserError(
            f"the checkpoint holds another {model} than {model}.model: its {name} is "
            f"{_shape(saved.get(name))}, the model's {_shape(here.get(name))}; keep the {model}.model of the run"
        )


def facts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every saved tensor as a whole."""
    if isinstance(tensors, OnDisk):
        return tensors.facts()
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into those of the same names and shapes; into a DTensor what this process holds of it."""
    if isinstance(tensors, OnDisk):
        tensors.read_into(targets)
        return
    for name, target in targets.items():
        if isinstance(target, DTensor):
            spec = target.shape, target.device_mesh, target.placements
            shape, begin = compute_local_shape_and_global_offset(*spec)
            held = tuple(slice(start, start + size) for start, size in zip(begin, shape, strict=True))
            target.to_local().copy_(tensors[name][held])
        else:
            target.copy_(tensors[name])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of AdamW and its kin as "<parameter name>.<key>" -> tensor (exp_avg, exp_avg_sq, step), no copies.

    names: name -> parameter, as dict(model.named_parameters()). Parameters without state (no step yet, or never a
    gradient) have no entries. Hyper-parameters are not included: the configuration rules.
    """
    result = {}
    for name, parameter in _managed(optimizer, names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the optimizer's state {key!r} of {name} is not a tensor: {type(value).__name__}")
            result[f"{name}.{key}"] = value
    return result


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]
) -> None:
    """Replaces the optimizer's whole state by copies of what optimizer_tensors() gave, to the bit.

    Raises UserError, with the optimizer as it was, where a tensor belongs to no parameter or does not fit it.
    """
    managed = _managed(optimizer, names)
    at_device = {
        parameter: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    restored: dict[Tensor, dict[str, str]] = {}
    found = facts(tensors)
    for full_name, (shape, dtype) in found.items():
        name, _, key = full_name.rpartition(".")
        if name not in managed:
            raise UserError(
                f"the checkpoint has the optimizer state {full_name}, but the optimizer has no parameter {name!r}: "
                "resume with the model that the checkpoint was made with"
            )
        parameter = managed[name]
        if key != "step" and (shape != parameter.shape or dtype != parameter.dtype):
            raise UserError(
                f"the checkpoint's optimizer state {full_name} is {dtype} {list(shape)}, the parameter "
                f"is {parameter.dtype} {list(parameter.shape)}: resume with the model and dtype of the checkpoint"
            )
        restored.setdefault(parameter, {})[key] = full_name
    keys = {frozenset(state) for state in restored.values()}
    needed = {"step"} if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else set()
    if len(keys) > 1 or any(not needed <= each for each in keys):
        raise UserError("the checkpoint's optimizer state is incomplete for some parameters: resume from another one")
    for parameter in managed.values():
        if parameter not in restored:
            for value in optimizer.state.get(parameter, {}).values():
                value.zero_()
    targets: dict[str, Tensor] = {}
    for parameter, keyed in restored.items():
        own = optimizer.state.setdefault(parameter, {})
        for key, full_name in keyed.items():
            # Into the memory that is there: others may look at it, and there may be no room for as much again.
            if key not in own and key == "step":
                shape, dtype = found[full_name]
                own[key] = torch.empty(shape, dtype=dtype, device=parameter.device if at_device[parameter] else "cpu")
            elif key not in own:
                own[key] = torch.empty_like(parameter, requires_grad=False)
            targets[full_name] = own[key]
    copy_into(targets, tensors)


def _managed(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> parameter for every parameter of the optimizer."""
    name_of: dict[Tensor, str] = {}
    for name, parameter in names.items():
        name_of.setdefault(parameter, name)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [tuple(parameter.shape) for parameter in parameters if parameter not in name_of]
    if missing:
        raise ValueError(f"the optimizer has parameters that `names` lacks, of shapes {missing}")
    return {name_of[parameter]: parameter for parameter in parameters}
