"""A model in shards over all processes, by FSDP2.

Every decoder layer is gathered whole for the time of its forward and its backward pass, and everything else (embedding,
final norm, heads) for that of the whole model. What reads those others has to run inside the model's own forward(),
between FSDP's hooks: inside() does that, and in there a model is the one that a single process has.

Gradients are added up over the processes, not averaged: every denominator is counted over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial, update_wrapper
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gadcore.distributed.world import World

T = TypeVar("T")


class _Forward:
    """The forward() of a sharded model: its own, or whatever is to be computed with its whole parameters."""

    def __init__(self, own: Callable[..., Any]) -> None:
        # Others look at its signature: generate() asks what the model takes.
        update_wrapper(self, own)
        self.own = own
        self.running = False

    def __call__(self, *args: Any, inside: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if inside is None:
            return self.own(*args, **kwargs)
        self.running = True
        try:
            return inside()
        finally:
            self.running = False


def shard(model: nn.Module, layers: Iterable[nn.Module], world: World) -> None:
    """Leaves of a model's parameters this process's shards, in place. layers: its decoder layers.

    Parameters become DTensors, cut by rows; their names stay, and tied ones stay tied. They may be on the meta device:
    materialise() follows then. Before the model's optimizer is made.
    """
    assert world.mesh is not None
    # What is narrower than float32 is added up in it.
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    for layer in layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    for module in _modules(model):
        # The first, since gloo has no sum that is scaled on the way.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    model.forward = _Forward(model.forward)  # type: ignore[method-assign]
    # After FSDP's own hooks were registered, so that it runs before them.
    model.register_forward_pre_hook(_are_here, prepend=True)
    if not any(p.is_meta for p in model.parameters()):
        _settle(model)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives the shards of a model that was sharded on the meta device memory of their own, of any content."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    # to_empty() has thrown away what no checkpoint holds: positions' frequencies, scales of embeddings.
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    _settle(model)


def _settle(model: nn.Module) -> None:
    """Lets FSDP do now what it would do in the first forward: it may put another tensor in a shard's place."""
    root: Any = model
    root._get_fsdp_state()._lazy_init()
    for parameter in _parameters(model):
        data, local = parameter._sharded_param_data, parameter.sharded_param._local_tensor
        if data.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
            raise RuntimeError("FSDP gathers from other memory than its parameters': this PyTorch is not supported")


def gather_in(dtype: torch.dtype, model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
    """Lets those of `parameters` that are float32 be gathered in a narrower dtype.

    For what every computation casts to it, as autocast does for products: the same bits, half of the bytes on their
    way, and nothing of them that a backward pass keeps stays when a layer's parameters go. Gradients are float32, and
    so are shards. On all processes together.
    """
    for module in _modules(model):
        found = [p for p in _own(module) if p.sharded_param in parameters and p.orig_dtype == torch.float32]
        for parameter in found:
            # FSDP asks for it again and again.
            parameter.init_dtype_attrs = partial(_narrow, parameter, dtype)
            # Made by the first gathering, in the dtype that it had.
            parameter.all_gather_outputs = []
            vars(parameter).pop("_unsharded_param", None)
        module.unshard()
        for parameter in found:
            parameter.unsharded_param.grad_dtype = torch.float32
        module.reshard()


def _narrow(parameter: Any, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> None:
    """In place of what a policy says of all parameters of a group alike."""
    parameter.orig_dtype, parameter.param_dtype = parameter.sharded_param.dtype, dtype
    parameter.reduce_dtype = policy.reduce_dtype


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def inside(model: nn.Module, compute: Callable[[], T]) -> T:
    """compute(), with the parameters of `model` whole where they are read; a plain model's are.

    On all processes together. What it returns may be differentiated: backward() gathers and adds up by itself.
    """
    if not is_sharded(model) or model.forward.running:  # type: ignore[attr-defined]
        return compute()
    result: T = model(inside=compute)
    if not _differentiable(result):
        # No backward pass will: embedding and heads would stay, and be taken for the model's parameters.
        reshard_all(model)
    return result


def _differentiable(result: object) -> bool:
    if isinstance(result, tuple):
        return any(map(_differentiable, result))
    return isinstance(result, Tensor) and result.requires_grad


def reset(model: nn.Module) -> None:
    """Forgets a forward pass that no backward pass follows, or that has failed."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def reshard_all(model: nn.Module) -> None:
    """Frees whatever is gathered."""
    for module in _modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter, gradient or moment, the tensor itself and no copy; a plain tensor is its own.

    It has no rows where there are fewer than processes.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The row of the whole parameter that local() begins with."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0])


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which every process has a part, as the parameter `like` is cut; on all processes together."""
    if not isinstance(like, DTensor):
        return part
    return DTensor(part.to(like.device), like._spec, requires_grad=False).full_tensor()


def memory(model: nn.Module) -> list[Tensor]:
    """Every tensor that looks at the memory of a model's parameters: where it moves, all of them have to follow.

    FSDP gathers from a flat, padded one behind each shard.
    """
    if not is_sharded(model):
        return list(model.parameters())
    return [t for p in _parameters(model) for t in (p._sharded_param_data, p.sharded_param._local_tensor)]


def gathered(model: nn.Module) -> set[int]:
    """Ids (untyped_storage()._cdata) of the storages that gathered parameters lie in."""
    if not is_sharded(model):
        return set()
    return {t.untyped_storage()._cdata for p in _parameters(model) for t in p.all_gather_outputs}


def _modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _parameters(model: nn.Module) -> list[Any]:
    """FSDP's own records of the parameters."""
    return [parameter for module in _modules(model) for parameter in _own(module)]


def _own(module: Any) -> list[Any]:
    """Those that are gathered with a module."""
    return [parameter for group in module._get_fsdp_state()._fsdp_param_groups for parameter in group.fsdp_params]


def _are_here(model: nn.Module, args: object) -> None:
    """Shards that wait elsewhere are empty: FSDP would gather nothing and compute NaN of it, without an error."""
    if not all(parameter._sharded_param_data.numel() for parameter in _own(model)):
        raise RuntimeError("the model's parameters are away: its state has to be entered first")
