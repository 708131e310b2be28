"""RMS norm over the last dimension, in one pass each way.

    r = 1 / sqrt(mean_i x_i^2 + eps)        y_i = x_i r (w_i + shift)
    d x_i = r (g_i (w_i + shift) - x_i r mean_j(g_j (w_j + shift) x_j r))        d w_i = sum over rows of g_i x_i r

shift is 0, or 1 where a model stores its weights around 0 (Gemma).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose, implementation


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The norm [.., H] of x, in `dtype`; gradients go to x and weight, each in its own.

    x: [.., H]; weight: [H], of any floating dtypes; everything is computed in float32 at least and rounded once. dtype:
    that of x by default; under autocast that of the products which read the norm, so that nobody has to cast it.
    "cpu" computes float32, "triton" float32, bfloat16 and float16, "reference" everything. Raises ValueError for
    arguments that do not fit, RuntimeError for an `impl` that is not there.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"weight must be [H] for x [.., H], both of floating dtypes, got {list(weight.shape)} {weight.dtype} for "
            f"{list(x.shape)} {x.dtype}"
        )
    chosen = choose("rms_norm", impl, x)
    dtype = dtype or x.dtype
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps, shift, dtype)
    if chosen == "cpu":
        y, _ = _op(x.reshape(-1, x.shape[-1]), weight.to(x.dtype), eps, shift, x.dtype, chosen)
        return y.view(x.shape).to(dtype)
    y, _ = _op(x.reshape(-1, x.shape[-1]), weight, eps, shift, dtype, chosen)
    return y.view(x.shape)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, shift: float, dtype: torch.dtype) -> Tensor:
    """The mathematics in PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(wide.dtype) + shift)).to(dtype)


@torch.library.custom_op("gadcore::rms_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor, eps: float, shift: float, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    """(y in `dtype`, r): r [rows] float32 for the backward pass."""
    of_triton = (dtype,) if impl == "triton" else ()
    return implementation("rms_norm", impl)(x, weight, eps, shift, *of_triton)


@_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, shift: float, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("gadcore::rms_norm_backward", mutates_args=())
def _op_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, shift: float, impl: str
) -> tuple[Tensor, Tensor]:
    """(d x, d weight)."""
    return implementation("rms_norm", impl, "backward")(grad, x, weight, rstd, shift)


@_op_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, shift: float, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.shift, _, ctx.impl = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return *_op_backward(grad, *ctx.saved_tensors, ctx.shift, ctx.impl), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
