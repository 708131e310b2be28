"""What the backward pass keeps of a forward pass: everything, matrix products, or the inputs of layers alone.

off        nothing is computed twice but what costs next to nothing: on the CPU, norms and gated activations.
selective  results of matrix products and attention are kept; norms, activations and rotations are computed again.
           On the CPU, where "off" computes norms and activations again as well, it may keep more than that.
full       only the input of every layer is kept; the whole layer is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.distributed import fsdp
from gadcore.distributed.world import ALONE, World
from gadcore.kernels import lora_linear  # noqa: F401 - registers its ops
from gadcore.models.backbone import hidden_states
from gadcore.models.fused import Recomputables, recomputing
from gadcore.models.precision import autocast as products_in
from gadcore.models.shallow import decoder_layers, shallow

Mode = Literal["off", "selective", "full"]
MODES: tuple[Mode, ...] = ("off", "selective", "full")

# Of what will be free for activations on a CPU, whose memory holds everything else as well, and on a GPU, where what
# other states hold is away: the rest is for the head, gradients on their way and what an allocator cannot use.
SHARE = {"cpu": 0.4, "cuda": 0.8}
_PROBE_TOKENS = 64


def choose_mode(
    model: PreTrainedModel, tokens: int, autocast: str = "none", available: int | None = None, world: World = ALONE
) -> Mode:
    """The mode that computes the least again while activations of `tokens` packed tokens fit into the memory.

    autocast: that the model trains under. available: bytes; default what is free on the model's device, less the
    gradients where that is a GPU. world: of its processes the one with the least memory decides.
    """
    device = model.device
    if available is None:
        available = free_bytes(device)
        if device.type == "cuda":
            available -= sum(fsdp.local(p).nbytes for p in model.parameters() if p.requires_grad)
        else:
            available //= world.neighbours
        if world.size > 1:
            available = -int(world.max_(torch.tensor(-available)))
    budget = SHARE.get(device.type, SHARE["cpu"]) * available
    needed = bytes_per_token(model, autocast)
    return next((mode for mode in MODES if needed[mode] * tokens <= budget), "full")


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes; on a GPU with what this process's allocator keeps for later."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_per_token(model: PreTrainedModel, autocast: str = "none") -> dict[Mode, int]:
    """Bytes that each mode keeps per packed token: "off" is measured, the others follow from the layers' sizes."""
    layers = decoder_layers(model)
    config = model.config.get_text_config()
    stream = next(model.parameters()).element_size()
    size = min(stream, 2) if autocast == "bfloat16" else stream
    products = sum(m.out_features for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = len(layers) * config.num_attention_heads * head_dim
    inputs = len(layers) * config.hidden_size
    return {
        "off": _measured(model, autocast),
        "selective": size * (products + attention) + stream * inputs,
        "full": stream * inputs,
    }


def _measured(model: PreTrainedModel, autocast: str) -> int:
    """Bytes of mode "off", from runs of the first and of the first two layers: of the others each is one more."""
    layers = len(decoder_layers(model))
    if layers < 2:
        return _kept(model, layers, autocast) // _PROBE_TOKENS
    one, two = _kept(model, 1, autocast), _kept(model, 2, autocast)
    return (one + (layers - 1) * (two - one)) // _PROBE_TOKENS


def _kept(model: PreTrainedModel, layers: int, autocast: str) -> int:
    """Bytes that the first so many layers keep of the probe's tokens, with what lies around them."""
    sharded = fsdp.is_sharded(model)
    parameters = set() if sharded else {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    again = Recomputables()

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Gathered parameters are there for a layer's time only, and another takes their place.
        of_parameters = storage._cdata in fsdp.gathered(model) if sharded else storage.data_ptr() in parameters
        if not of_parameters and again.of(tensor) is None:
            kept[storage.data_ptr()] = storage.nbytes()
        # The tensor itself may be the result of the node that keeps it: a cycle that would never be freed, and with
        # it the graph and all weights as they were loaded.
        return tensor.detach()

    ids = tuple(1 + i % 7 for i in range(_PROBE_TOKENS // 2))
    batch = GroupedBatch.of([GroupTokens(ids, (ids,))], last_tokens=True, device=model.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with torch.enable_grad(), shallow(model, layers), again.collected(), hooks, products_in(autocast, model.device):
        # Not a view of it, of which FSDP would warn.
        out = fsdp.inside(model, lambda: hidden_states(model, batch).sum())
    assert out.grad_fn is not None, "the model has no parameter that is trained"
    fsdp.reset(model)
    return sum(kept.values())


def set_mode(
    model: PreTrainedModel, mode: Mode | Literal["auto"], tokens: int, autocast: str = "none", world: World = ALONE
) -> Mode:
    """Lets every layer keep what `mode` says, and returns it; "auto": what choose_mode() chooses for `tokens`.

    Takes the place of a mode that was set before.
    """
    for layer in decoder_layers(model):
        before = vars(layer).get("forward")
        if isinstance(before, partial) and before.func is _forward:
            # What lies behind it is the forward() of the layer's class.
            del layer.forward
    chosen = choose_mode(model, tokens, autocast, world=world) if mode == "auto" else mode
    for layer in decoder_layers(model):
        layer.forward = partial(_forward, chosen, layer.forward)
    return chosen


def _forward(mode: Mode, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _AGAIN[mode](forward, *args, **kwargs)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _products() else CheckpointPolicy.PREFER_RECOMPUTE


_checkpoint = partial(checkpoint, use_reentrant=False)
_AGAIN: dict[Mode, Callable[..., Any]] = {
    "off": recomputing,
    "selective": partial(_checkpoint, context_fn=partial(create_selective_checkpoint_contexts, _keep_products)),
    "full": _checkpoint,
}


def _products() -> set[Any]:
    aten = torch.ops.aten
    return {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        # What kernels/cpu/linear.py multiplies by.
        torch.ops.mkldnn._linear_pointwise.default,
        torch.ops.gadcore.prefix_attention.default,
        torch.ops.gadcore.lora_product.default,
        torch.ops.gadcore.lora_product_of_bits.default,
    }
