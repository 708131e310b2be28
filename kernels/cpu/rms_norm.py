"""RMS norm over the last dimension, in one pass each way.

    r = 1 / sqrt(mean_i x_i^2 + eps)        y_i = x_i r (w_i + shift)
    d x_i = r (g_i (w_i + shift) - x_i r mean_j(g_j (w_j + shift) x_j r))        d w_i = sum over rows of g_i x_i r

shift is 0, or 1 where a model stores its weights around 0 (Gemma).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gadcore.kernels.cpu import native


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, shift: float = 0.0, impl: native.Impl = "auto") -> Tensor:
    """x: [.., H]; weight: [H], of one dtype. Returns [.., H] in it; gradients go to both.

    "cpu" computes float32; "reference" everything, in float32 or above. Raises ValueError for arguments that do not
    fit, RuntimeError for an `impl` that is not there.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be [H] for x [.., H] of its dtype, got {list(weight.shape)} {weight.dtype} for "
            f"{list(x.shape)} {x.dtype}"
        )
    chosen = native.choose("rms_norm", impl, x)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps, shift)
    y, _ = _op(x.reshape(-1, x.shape[-1]), weight, eps, shift)
    return y.view(x.shape)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, shift: float) -> Tensor:
    """The mathematics in PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(wide.dtype) + shift)).to(x.dtype)


@torch.library.custom_op("gadcore::rms_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """(y, r): r [rows] for the backward pass."""
    return native.function("rms_norm")(x, weight, eps, shift)


@_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@torch.library.custom_op("gadcore::rms_norm_backward", mutates_args=())
def _op_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """(d x, d weight)."""
    return native.function("rms_norm", "backward")(grad, x, weight, rstd, shift)


@_op_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.shift = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return *_op_backward(grad, *ctx.saved_tensors, ctx.shift), None, None


_op.register_autograd(_backward, setup_context=_setup_context)
