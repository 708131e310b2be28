"""Faster norms, gated MLPs and rotations on CUDA, for the modules that gadcore.models.fused finds in a backbone.

Norms and gated activations are Liger's functions, taken one by one: its way of replacing them changes the classes of
transformers for the whole process, and its rotation writes into what checkpointing has kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gadcore.errors import UserError
from gadcore.kernels.rotary import fits, rotary


def _liger() -> Any:
    try:
        from liger_kernel import ops
    except ImportError as error:
        raise UserError(f"the fused backbone on CUDA needs liger-kernel: pip install liger-kernel ({error})") from error
    return ops


def norm(eps: float, shift: float, read_by_products: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward pass of an RMS norm. read_by_products: nothing else reads its result."""
    return partial(_norm, eps=eps, shift=shift, read_by_products=read_by_products)


def norm_of(x: Tensor, weight: Tensor, *, eps: float, shift: float) -> Tensor:
    """What such a norm computes: in float32, rounded once to the dtype of x."""
    # Its backward pass may overwrite the gradient that it is given only where nobody else was given the same one.
    normed: Tensor = _liger().LigerRMSNormFunction.apply(x, weight, eps, shift, "gemma", False)
    return normed


def _norm(self: nn.Module, hidden_states: Tensor, *, eps: float, shift: float, read_by_products: bool) -> Tensor:
    normed = norm_of(hidden_states, self.weight, eps=eps, shift=shift)  # type: ignore[arg-type]
    return narrow(normed) if read_by_products else normed


def mlp(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward pass of a gated MLP of three linear layers."""
    return _mlp


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    x = narrow(x)
    gated = _liger().LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[operator]
    return self.down_proj(gated)  # type: ignore[operator, no-any-return]


def narrow(x: Tensor) -> Tensor:
    """What several products read, cast once where autocast would cast it for each of them."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def product(module: nn.Module) -> None:
    """Linear layers stay torch's."""


def rotates() -> bool:
    """Whether rotate() has a faster way."""
    return True


def rotate(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb(): q [1, Hq, T, D] and k [1, Hk, T, D] by cos and sin [1, T, D].

    Results keep the dtypes of q and k, which are the products' under autocast, and are computed in float32.
    """
    single = q.dim() == k.dim() == 4 and cos.dim() == 3 and len(q) == len(k) == len(cos) == unsqueeze_dim == 1
    if not single or not q.is_cuda:
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    rows = [(x[0].transpose(0, 1), cos[0], sin[0]) for x in (q, k)]
    if not all(fits(*row) for row in rows):
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    turned, keys = (rotary(*row).transpose(0, 1)[None] for row in rows)
    return turned, keys
