"""Rows of a matrix by index, whose gradients are added up in a fixed order where an index is repeated.

y_r = x_(index_r)        d x_n = sum over the r with index_r = n, in ascending order, of d y_r

PyTorch's own gradient adds repeated rows by atomics on a GPU: in another order, and to other last bits, on every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose, implementation


def take_rows(x: Tensor, index: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x[index] [R, H], of the dtype of x; the gradient goes to x.

    x: [N, H] of a floating dtype; index: [R] int64 of 0 .. N - 1, in any order, repeated or not. Gradients are added
    up in float32 and rounded once by "triton", which takes float32, bfloat16 and float16; "reference" is PyTorch's and
    takes everything. Raises ValueError for arguments that do not fit, RuntimeError for an `impl` that is not there.
    """
    if x.dim() != 2 or not x.is_floating_point() or index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(
            "x must be [N, H] of a floating dtype, index [R] int64, got "
            + ", ".join(f"{list(t.shape)} {t.dtype}" for t in (x, index))
        )
    chosen = choose("take_rows", impl, x)
    return x.index_select(0, index) if chosen == "reference" else _op(x, index, chosen)


@torch.library.custom_op("gadcore::take_rows", mutates_args=())
def _op(x: Tensor, index: Tensor, impl: str) -> Tensor:
    return x.index_select(0, index)


@_op.register_fake
def _(x: Tensor, index: Tensor, impl: str) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


@torch.library.custom_op("gadcore::take_rows_backward", mutates_args=())
def _op_backward(grad: Tensor, index: Tensor, rows: int, impl: str) -> Tensor:
    return implementation("take_rows", impl, "backward")(grad, index, rows)


@_op_backward.register_fake
def _(grad: Tensor, index: Tensor, rows: int, impl: str) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.impl = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return _op_backward(grad, index, ctx.rows, ctx.impl), None, None


_op.register_autograd(_backward, setup_context=_setup_context)
