"""Faster norms, gated activations, products, rotations and embeddings for a backbone on a CPU, by the modules' own
classes, not the model's name.

They are those of kernels/cpu, and the backward pass can make results of norms and activations again (recompute.py,
kernels/cpu/gated_mlp.py). A module that is built in another way than the ones known here keeps its own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import MethodType, ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from gadcore.cpu.recompute import recomputable
from gadcore.kernels.cpu import gated_mlp, native, rotary
from gadcore.kernels.cpu.linear import linear, onednn_is_faster
from gadcore.kernels.cpu.rms_norm import rms_norm
from gadcore.kernels.cpu.swiglu import swiglu


def fuse(model: PreTrainedModel) -> int:
    """Replaces forward passes of norms, MLPs and linear layers by faster ones with the same mathematics; returns how
    many norms and MLPs.

    In one process gradients of the products' weights are added in place to those of earlier passes; see
    embed_in_place(). Parameters stay where they are.
    """
    fused = 0
    for file in {type(module).__module__ for module in model.modules()}:
        _fuse_rotation(sys.modules[file])
    for module in model.modules():
        forward = _fused_norm(module) or _fused_mlp(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            fused += 1
        elif type(module) is nn.Linear and module.weight.dtype == torch.float32 and onednn_is_faster():
            module.forward = MethodType(partial(_linear, in_place=alone()), module)  # type: ignore[method-assign]
    return fused


def _fused_norm(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or eps is None:
        return None
    probe = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        expected = module(probe)
        # Some families store weights around 1, some around 0: whichever gives the module's own result.
        for shift in (0.0, 1.0):
            if torch.allclose(rms_norm(probe, weight, eps=eps, shift=shift), expected, rtol=1e-2, atol=1e-5):
                return partial(_rms_norm, eps=eps, shift=shift)
    return None


def _rms_norm(self: nn.Module, hidden_states: Tensor, *, eps: float, shift: float) -> Tensor:
    weight: Tensor = self.weight.to(hidden_states.dtype)  # type: ignore[operator, assignment]
    recompute = partial(rms_norm, hidden_states.detach(), weight.detach(), eps=eps, shift=shift)
    return recomputable(rms_norm(hidden_states, weight, eps=eps, shift=shift), recompute)


def _fused_mlp(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    known = type(module).__name__.endswith("MLP") and silu and all(isinstance(part, nn.Linear) for part in parts)
    if not known:
        return None
    plain = all(type(part) is nn.Linear and part.bias is None and part.weight.dtype == torch.float32 for part in parts)
    return partial(_whole_mlp, in_place=alone()) if plain and gated_mlp.available() else _gated_mlp


def _whole_mlp(self: nn.Module, x: Tensor, *, in_place: bool) -> Tensor:
    if torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
        return _gated_mlp(self, x)
    weights: list[Tensor] = [part.weight for part in (self.gate_proj, self.up_proj, self.down_proj)]  # type: ignore[union-attr, misc]
    return gated_mlp.gated_mlp(x, *weights, in_place=in_place)


def _gated_mlp(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[operator]
    return self.down_proj(recomputable(swiglu(gate, up), partial(swiglu, gate.detach(), up.detach())))  # type: ignore[operator]


def _linear(self: nn.Module, x: Tensor, *, in_place: bool) -> Tensor:
    return linear(x, self.weight, self.bias, in_place=in_place)  # type: ignore[arg-type]


def _fuse_rotation(file: ModuleType) -> None:
    """Rotates queries and keys by kernels/cpu/rotary.py, where a model's file has the usual function for it.

    The function is the file's: other models of the family in this process rotate by it as well.
    """
    own = getattr(file, "apply_rotary_pos_emb", None)
    if own is None or isinstance(own, partial) or not native.available("cpu_rotary"):
        return
    q, k = torch.linspace(-1, 2, 48).view(1, 2, 3, 8), torch.linspace(-3, 1, 24).view(1, 1, 3, 8)
    cos, sin = torch.linspace(-1, 1, 24).view(1, 3, 8), torch.linspace(2, 0, 24).view(1, 3, 8)
    try:
        expected = own(q, k, cos, sin)
    except (TypeError, RuntimeError):
        # It takes something else.
        return
    usual = isinstance(expected, tuple) and len(expected) == 2
    if usual and all(map(partial(torch.allclose, atol=1e-5), expected, _rotate(own, q, k, cos, sin))):
        file.apply_rotary_pos_emb = partial(_rotate, own)  # type: ignore[attr-defined]


def _rotate(
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
