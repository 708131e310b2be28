"""Rotary position embedding of one tensor, in one pass each way. With h = D / 2 and i < h:

y_i = x_i cos_i - x_(i+h) sin_i                      d x_i = d y_i cos_i + d y_(i+h) sin_(i+h)
y_(i+h) = x_(i+h) cos_(i+h) + x_i sin_(i+h)          d x_(i+h) = d y_(i+h) cos_(i+h) - d y_i sin_i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gadcore.kernels.cpu import native


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, impl: native.Impl = "auto") -> Tensor:
    """x: [T, H, D] of an even D; cos, sin: [T, D], of one dtype. Returns [T, H, D] in it; the gradient goes to x.

    "cpu" computes float32, "reference" everything. Raises ValueError for arguments that do not fit, RuntimeError for an
    `impl` that is not there.
    """
    if not fits(x, cos, sin):
        raise ValueError(
            "x must be [T, H, D] with an even D, cos and sin [T, D] of its dtype, got "
            + ", ".join(f"{list(t.shape)} {t.dtype}" for t in (x, cos, sin))
        )
    chosen = native.choose("rotary", impl, x)
    return rotary_reference(x, cos, sin) if chosen == "reference" else _op(x, cos, sin, False)


def fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether rotary() takes these shapes and dtypes."""
    even = x.dim() == 3 and x.shape[2] % 2 == 0
    return even and all(t.shape == (x.shape[0], x.shape[2]) and t.dtype == x.dtype for t in (cos, sin))


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The mathematics in PyTorch."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


@torch.library.custom_op("gadcore::rotary", mutates_args=())
def _op(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return native.function("rotary")(x, cos, sin, back)


@_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Backward of backward is forward: both are linear.
    return _op(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
