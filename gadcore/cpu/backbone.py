"""Faster norms, gated MLPs, products, rotations and embeddings for the modules that gadcore.models.fused finds in a
backbone.

They are those of kernels/cpu, and the backward pass can make results of norms and activations again (recompute.py,
kernels/cpu/gated_mlp.py). In one process gradients of the products' weights are added in place to those of earlier
passes; see embed_in_place().
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.cpu.recompute import recomputable
from gadcore.kernels import lora_gated_mlp, rotary
from gadcore.kernels.cpu import gated_mlp, native
from gadcore.kernels.cpu.linear import linear, onednn_is_faster
from gadcore.kernels.cpu.swiglu import swiglu
from gadcore.kernels.lora_linear import LoRALinear
from gadcore.kernels.quantised_linear import frozen_weight
from gadcore.kernels.rms_norm import rms_norm


def norm(eps: float, shift: float, read_by_products: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward pass of an RMS norm. read_by_products: nothing else reads its result, which matters on CUDA alone."""
    return partial(_rms_norm, eps=eps, shift=shift)


def norm_of(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> Tensor:
    """What such a norm computes."""
    return rms_norm(x, weight, eps=eps, shift=shift)


def _rms_norm(self: nn.Module, hidden_states: Tensor, *, eps: float, shift: float) -> Tensor:
    weight: Tensor = self.weight.to(hidden_states.dtype)  # type: ignore[operator, assignment]
    recompute = partial(rms_norm, hidden_states.detach(), weight.detach(), eps=eps, shift=shift)
    return recomputable(rms_norm(hidden_states, weight, eps=eps, shift=shift), recompute)


def mlp(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward pass of a gated MLP of three linear layers."""
    parts = [module.gate_proj, module.up_proj, module.down_proj]
    if all(type(part) is LoRALinear and part.bias is None for part in parts) and lora_gated_mlp.available():
        return _adapted_mlp
    plain = all(type(part) is nn.Linear and part.bias is None and part.weight.dtype == torch.float32 for part in parts)
    return partial(_whole_mlp, in_place=alone()) if plain and gated_mlp.available() else _gated_mlp


def _whole_mlp(self: nn.Module, x: Tensor, *, in_place: bool) -> Tensor:
    if torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
        return _gated_mlp(self, x)
    weights: list[Tensor] = [part.weight for part in (self.gate_proj, self.up_proj, self.down_proj)]  # type: ignore[union-attr, misc]
    return gated_mlp.gated_mlp(x, *weights, in_place=in_place)


def _adapted_mlp(self: nn.Module, x: Tensor) -> Tensor:
    parts: list[LoRALinear] = [self.gate_proj, self.up_proj, self.down_proj]  # type: ignore[list-item]
    weights = [frozen_weight(part) for part in parts]
    tensors = [x, *(part.lora_A for part in parts), *(weight for weight in weights if isinstance(weight, Tensor))]
    if torch.is_autocast_enabled("cpu") or any(tensor.dtype != torch.float32 for tensor in tensors):
        return _gated_mlp(self, x)
    adapted = (
        lora_gated_mlp.Adapted(weight, part.lora_A, part.lora_B, part.scale)
        for weight, part in zip(weights, parts, strict=True)
    )
    return lora_gated_mlp.lora_gated_mlp(x, *adapted)


def _gated_mlp(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[operator]
    return self.down_proj(recomputable(swiglu(gate, up), partial(swiglu, gate.detach(), up.detach())))  # type: ignore[operator]


def product(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """The forward pass of a linear layer; None where torch's own is as fast."""
    fits = type(module) is nn.Linear and module.weight.dtype == torch.float32 and onednn_is_faster()
    return partial(_linear, in_place=alone()) if fits else None


def _linear(self: nn.Module, x: Tensor, *, in_place: bool) -> Tensor:
    return linear(x, self.weight, self.bias, in_place=in_place)  # type: ignore[arg-type]


def rotates() -> bool:
    """Whether rotate() has a faster way."""
    return native.available("cpu_rotary")


def rotate(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb(): q [1, Hq, T, D] and k [1, Hk, T, D] by cos and sin [1, T, D]."""
    single = q.dim() == k.dim() == 4 and cos.dim() == 3 and len(q) == len(k) == len(cos) == unsqueeze_dim == 1
    if not single or q.device.type != "cpu" or q.dtype != torch.float32:
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    rows = [(x[0].transpose(0, 1), cos[0], sin[0]) for x in (q, k)]
    if not all(rotary.fits(*row) for row in rows):
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    turned, keys = (rotary.rotary(*row).transpose(0, 1)[None] for row in rows)
    return turned, keys


def embed_in_place(model: PreTrainedModel) -> bool:
    """Lets the gradient of the token embedding be added to what is there already, row by row; True where it does.

    Autograd makes it whole, [vocabulary, hidden], beside the gradient that a tied output head or an earlier pass has
    left, and adds the two. In one process: what gathers gradients over several would not see it, nor does
    torch.autograd.grad(), only backward(). An embedding that does more than look rows up keeps its own code.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        # A model of no tokens, such as the toys of the paper's mixtures.
        return False
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq
    if not plain or not alone():
        return False
    embedding.forward = MethodType(_embed, embedding)
    return True


def gradient_in_place(weight: Tensor, autocast: str) -> Tensor | None:
    """The gradient that an earlier pass has left of an output head, where the native op can add the next one to it.

    Autograd would make the next one, [vocabulary, hidden], while all activations are there, and then add the two. None
    elsewhere, under another autocast than "none", and over several processes.
    """
    fits = weight.dtype == torch.float32 and autocast == "none" and alone()
    return weight.grad if fits and native.available("cpu_linear_grpo_loss") else None


def alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _embed(self: nn.Embedding, ids: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and self.weight.requires_grad):
        return F.embedding(ids, self.weight)
    # A leaf: the graph ends here, and what arrives is taken by the hook.
    rows = F.embedding(ids, self.weight.detach()).requires_grad_()
    rows.register_post_accumulate_grad_hook(partial(_add_rows, self.weight, self.padding_idx, ids))
    return rows


def _add_rows(weight: Tensor, padding_idx: int | None, ids: Tensor, rows: Tensor) -> None:
    assert rows.grad is not None
    grad, rows.grad = rows.grad, None
    if padding_idx is not None:
        # As in torch's own backward pass.
        grad = grad.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    weight.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(weight.grad.dtype))
