"""Rotary position embedding of one tensor, in one pass each way. With h = D / 2 and i < h:

y_i = x_i cos_i - x_(i+h) sin_i                      d x_i = d y_i cos_i + d y_(i+h) sin_(i+h)
y_(i+h) = x_(i+h) cos_(i+h) + x_i sin_(i+h)          d x_(i+h) = d y_(i+h) cos_(i+h) - d y_i sin_i

x stays as it is: what a checkpoint has kept of it is still what it was. Where cos and sin have equal halves, as all
models' do, the gradient is the rotation by the opposite angle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose, implementation


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The rotation [T, H, D] of the heads of T tokens, contiguous, in the dtype of x; the gradient goes to x.

    x: [T, H, D] of any strides and an even D; H may be 0. cos, sin: [T, D] of one floating dtype, which need not be
    that of x: 16 bits are computed in float32 and rounded once. "cpu" computes float32, "triton" float32, bfloat16 and
    float16, "reference" everything. Raises ValueError for arguments that do not fit, RuntimeError for an `impl` that is
    not there.
    """
    if not fits(x, cos, sin):
        raise ValueError(
            "x must be [T, H, D] with an even D, cos and sin [T, D] of one floating dtype, got "
            + ", ".join(f"{list(t.shape)} {t.dtype}" for t in (x, cos, sin))
        )
    chosen = choose("rotary", impl, x)
    if chosen == "reference":
        return rotary_reference(x, cos, sin)
    if chosen == "cpu":
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return _op(x, cos, sin, False, chosen)


def fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether rotary() takes these shapes and dtypes."""
    even = x.dim() == 3 and x.shape[2] % 2 == 0 and x.is_floating_point() and cos.is_floating_point()
    return even and sin.dtype == cos.dtype and all(t.shape == (x.shape[0], x.shape[2]) for t in (cos, sin))


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The mathematics in PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, -1)
    cos, sin = (t.to(wide.dtype)[:, None] for t in (cos, sin))
    return (wide * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


@torch.library.custom_op("gadcore::rotary", mutates_args=())
def _op(x: Tensor, cos: Tensor, sin: Tensor, back: bool, impl: str) -> Tensor:
    return implementation("rotary", impl)(x, cos, sin, back)


@_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back, ctx.impl = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Backward of backward is forward: both are linear.
    return _op(grad, *ctx.saved_tensors, not ctx.back, ctx.impl), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
