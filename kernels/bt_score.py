"""Scores at last response tokens, and the Bradley-Terry loss over every (teacher, sample) pair of each group.

    D(x, y) = w . h_last + b
    loss    = sum over pairs of softplus(-(D(x, y_t) - D(x, y_s^i))) / denominator

The teacher is scored once per group and takes part in all of the group's pairs. Everything from h_last on
runs in fp32 (fp64 for fp64 inputs): at |D| of 8 to 16 a step of bf16 is 1/16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose, implementation, without_autocast
from gadcore.kernels.layout import GroupLayout


class BTScore(NamedTuple):
    """scores: [S]. loss: scalar. Without gradient, 0 where not paired: margin, accuracy: [S].

    paired: [S] bool, the samples whose group has a teacher; margin = D(x, y_t) - D(x, y_s^i); a tie is half a correct
    pair.
    """

    scores: Tensor
    loss: Tensor
    margin: Tensor
    accuracy: Tensor
    paired: Tensor


def bt_score(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: GroupLayout,
    *,
    denominator: float,
    impl: Impl = "auto",
) -> BTScore:
    """Scores S sequences and forms the BT loss over their groups.

    hidden: [T, H], any floating dtype (float64 by the reference alone) and strides; last_index: [S] int64 rows of
    hidden; weight: [H] and bias: scalar or None, any floating dtype. denominator: pairs in the whole batch. Groups
    without a teacher are scored and form no pairs. Gradients of scores and loss go to hidden, weight and bias.
    Identical rows score identically to the bit, wherever they lie. Raises ValueError for arguments that do not fit,
    RuntimeError for an `impl` that is not there.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point [T, H], got {hidden.dtype} {list(hidden.shape)}")
    if weight.shape != hidden.shape[1:] or (bias is not None and bias.numel() != 1):
        raise ValueError(f"weight must be [{hidden.shape[1]}] and bias one number, got {list(weight.shape)}")
    if last_index.shape != (groups.sequences,) or last_index.dtype != torch.int64:
        raise ValueError(
            f"last_index must be int64 [{groups.sequences}], got {last_index.dtype} {list(last_index.shape)}"
        )
    chosen = choose("bt_score", impl, hidden)
    paired = groups.paired
    if chosen == "reference":
        scores, loss, margin = _reference(hidden, last_index, weight, bias, groups, denominator)
    else:
        scores, loss, margin, _ = _op(
            hidden, last_index, weight, bias, groups.group_offsets, groups.has_teacher, float(denominator), chosen
        )
    accuracy = ((margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)).where(paired, 0.0)
    return BTScore(scores, loss, margin, accuracy, paired)


def _reference(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: GroupLayout,
    denominator: float,
) -> tuple[Tensor, Tensor, Tensor]:
    last = hidden[last_index]
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    # A row-wise product and sum instead of a matrix product: every score is then computed by the same
    # instructions whatever its position, and identical text scores identically to the bit.
    scores = (last * weight.to(last.dtype)).sum(-1)
    if bias is not None:
        scores = scores + bias.to(last.dtype).reshape(())
    paired = groups.paired
    # The first sequence of a sample's group is its teacher wherever the sample is paired.
    margin = (scores[groups.group_offsets[groups.group_of]] - scores).where(paired, 0.0)
    loss = F.softplus(-margin).where(paired, 0.0).sum() / denominator
    return scores, loss, margin.detach()


@torch.library.custom_op("gadcore::bt_score", mutates_args=())
def _op(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    has_teacher: Tensor,
    denominator: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores, loss, margin, slope), slope [S] the derivative of the undivided loss to the scores."""
    forward = implementation("bt_score", impl)
    with without_autocast(hidden):
        scores, pair_loss, margin, slope = forward(hidden, last_index, weight, bias, group_offsets, has_teacher)
    return scores, pair_loss.sum() / denominator, margin, slope


@_op.register_fake
def _(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    has_teacher: Tensor,
    denominator: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = hidden.new_empty(last_index.shape, dtype=torch.float32)
    return scores, scores.new_empty(()), torch.empty_like(scores), torch.empty_like(scores)


@torch.library.custom_op("gadcore::bt_score_backward", mutates_args=())
def _op_backward(
    grad_scores: Tensor, hidden: Tensor, last_index: Tensor, weight: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, zero but for the last rows; d weight; d bias)."""
    backward = implementation("bt_score", impl, "backward")
    return backward(grad_scores, hidden, last_index, weight)


@_op_backward.register_fake
def _(
    grad_scores: Tensor, hidden: Tensor, last_index: Tensor, weight: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), grad_scores.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, last_index, weight, bias, _, _, ctx.denominator, ctx.impl = inputs
    _, _, margin, slope = output
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)
    ctx.mark_non_differentiable(margin, slope)
    ctx.save_for_backward(hidden, last_index, weight, slope)


def _backward(ctx: Any, grad_scores: Tensor, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    hidden, last_index, weight, slope = ctx.saved_tensors
    total = grad_scores + slope * (grad_loss / ctx.denominator)
    d_hidden, d_weight, d_bias = _op_backward(total, hidden, last_index, weight, ctx.impl)
    if ctx.bias is not None:
        shape, dtype = ctx.bias
        d_bias = d_bias.reshape(shape).to(dtype)
    return d_hidden, None, d_weight, d_bias if ctx.bias is not None else None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
