"""y = x W^T + bias for the many rows of a training step, and its gradients, on CPUs.

    d x = d y W        d W = d y^T x        d bias = the sum of the rows of d y

torch multiplies float32 matrices by MKL. On CPUs with AVX-512 oneDNN, which torch holds as well, is faster at y and
d x; at d W it is not, and csrc/cpu/product.cpp takes that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.cpu import native


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: native.Impl = "auto",
    in_place: bool = False,
) -> Tensor:
    """F.linear(x, weight, bias).

    x: [.., K]; weight: [N, K]; bias: [N] or None. Returns [.., N] in their dtype; gradients go to all three, but none
    of second order. "cpu" computes float32 by oneDNN; "auto" takes it on CPUs with AVX-512 and outside of autocast, and
    F.linear ("reference") elsewhere. in_place lets "cpu" add the gradient of a weight to weight.grad where an earlier
    pass has left one: torch.autograd.grad() and hooks of the weight get None then. Raises ValueError for an
    `impl` that does not take these operands.
    """
    fits = x.device.type == "cpu" and all(t.dtype == torch.float32 for t in (x, weight, bias) if t is not None)
    if impl == "cpu":
        if not (fits and torch.backends.mkldnn.is_available()):
            raise ValueError(f'linear: impl="cpu" needs float32 on a CPU and oneDNN, got {x.dtype} on {x.device}')
    elif impl not in ("auto", "reference"):
        raise ValueError(f"linear: impl must be one of auto, reference, cpu, is {impl!r}")
    elif impl == "reference" or not (fits and onednn_is_faster()) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, in_place)  # type: ignore[no-any-return]


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is there and multiplies float32 faster than MKL: on CPUs with AVX-512."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) of float32 on a CPU, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x [N, K] of float32 grad [.., N] and x [.., K] on a CPU, without gradients."""
    grad, x = _rows(grad), _rows(x)
    return _weight_gradient(grad, x) if native.available("cpu_weight_gradient") else grad.t().mm(x)


def gradient_for(adds_to: Tensor | None, grad: Tensor, x: Tensor) -> Tensor | None:
    """weight_gradient(grad, x), for autograd to add; None where `adds_to`, a leaf, has a gradient and got it there."""
    into = adds_to.grad if adds_to is not None and adds_to.is_leaf else None
    if into is None or not native.available("cpu_add_weight_gradient"):
        return weight_gradient(grad, x)
    torch.ops.gadcore.cpu_add_weight_gradient(into, _rows(grad), _rows(x))
    return None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("gadcore::weight_gradient", mutates_args=())
def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.gadcore.cpu_weight_gradient(grad, x)  # type: ignore[no-any-return]


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[1], x.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Not the saved one: what checkpoints hand back is another tensor, without the gradient.
        ctx.adds_to = weight if in_place else None
        return onednn_product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            onednn_product(grad, weight.t()) if need_x else None,
            gradient_for(ctx.adds_to, grad, x) if need_weight else None,
            _rows(grad).sum(0) if need_bias else None,
            None,
        )
