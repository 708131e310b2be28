"""The Bradley-Terry last-token op in Triton: one launch forward, one backward.

    score_s = w . hidden[last_index_s] + b
    margin_i = score_teacher - score_i,  pair_loss_i = softplus(-margin_i)    for a sample i of a group with a teacher
    slope_i = sigmoid(-margin_i),  slope_teacher = -sum_i slope_i             d(sum of pair_loss) / d score

    d_hidden[t] = (sum over s with last_index_s = t of g_s) w
    d_weight = sum_s g_s hidden[last_index_s],  d_bias = sum_s g_s

What the two launches move, beside a few numbers per sequence:
  forward    S H elements of hidden, and the head once per group (it stays in the caches).
  backward   T H elements of d_hidden written, S H elements of hidden read. Every program that owns rows of d_hidden
             looks through last_index itself, 8 S bytes that stay in the caches, for 16 H elements written: sorting the
             sequences by row first would save those and cost three launches or more.
The order of every sum is fixed by the arguments' shapes: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A group of 8 samples and their teacher is one tile: all of its rows are in flight at once.
_GROUP_ROWS = 16
_OUT_ROWS = 16
_SCAN = 1024
_GATHER_ROWS = 64


@triton.jit
def _softplus(x):
    # log1p(e) as Kahan computes it: log(1 + e) alone has no correct digit once e is below 2^-24.
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    tail = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + tail


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _forward_kernel(
    hidden,
    stride_t,
    stride_h,
    last_index,
    weight,
    stride_w,
    bias,
    offsets,
    has_teacher,
    scores,
    pair_loss,
    margins,
    slopes,
    H,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    group = tl.program_id(0)
    start = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    taught = tl.load(has_teacher + group).to(tl.int32) != 0
    b = tl.load(bias).to(tl.float32) if HAS_BIAS else 0.0
    teacher_score = 0.0
    teacher_slope = 0.0
    for first in range(start, end, ROWS):
        sequence = first + tl.arange(0, ROWS)
        live = sequence < end
        row = tl.load(last_index + sequence, mask=live, other=0)
        sums = tl.zeros([ROWS, BLOCK_H], tl.float32)
        for h in range(0, H, BLOCK_H):
            # 64 bits also for the column: hidden may be a transposed view, whose stride_h is large.
            column = h + tl.arange(0, BLOCK_H).to(tl.int64)
            inside = column < H
            w = tl.load(weight + column * stride_w, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(
                hidden + row[:, None] * stride_t + column[None, :] * stride_h,
                mask=live[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            # fma by name: a compiler that fuses one row's products and not another's would tell equal rows apart.
            sums = tl.fma(x, tl.broadcast_to(w[None, :], [ROWS, BLOCK_H]), sums)
        score = tl.sum(sums, 1) + b
        is_teacher = taught & (sequence == start)
        paired = live & taught & (sequence != start)
        # Adds zeros to one number: the teacher's score as it is.
        teacher_score += tl.sum(tl.where(is_teacher, score, 0.0), 0)
        margin = tl.where(paired, teacher_score - score, 0.0)
        slope = tl.where(paired, _sigmoid(-margin), 0.0)
        teacher_slope -= tl.sum(slope, 0)
        tl.store(scores + sequence, score, mask=live)
        tl.store(margins + sequence, margin, mask=live)
        tl.store(pair_loss + sequence, tl.where(paired, _softplus(-margin), 0.0), mask=live)
        tl.store(slopes + sequence, slope, mask=live & (is_teacher == 0))
    tl.store(slopes + start, teacher_slope, mask=taught & (start < end))


@triton.jit
def _backward_kernel(
    grad_scores,
    hidden,
    stride_t,
    stride_h,
    last_index,
    weight,
    stride_w,
    d_hidden,
    d_weight,
    d_bias,
    T,
    H,
    S,
    weight_programs,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCAN: tl.constexpr,
    GATHER_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < weight_programs:
        # First in the grid: these wait for gathered rows, and the rest of the grid hides that.
        column = program * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
        inside = column < H
        sums = tl.zeros([GATHER_ROWS, COLUMNS], tl.float32)
        total = tl.zeros([GATHER_ROWS], tl.float32)
        for s in range(0, S, GATHER_ROWS):
            sequence = s + tl.arange(0, GATHER_ROWS)
            live = sequence < S
            row = tl.load(last_index + sequence, mask=live, other=0)
            g = tl.load(grad_scores + sequence, mask=live, other=0.0)
            x = tl.load(
                hidden + row[:, None] * stride_t + column[None, :] * stride_h,
                mask=live[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            sums += g[:, None] * x
            total += g
        tl.store(d_weight + column, tl.sum(sums, 0).to(d_weight.dtype.element_ty), mask=inside)
        if program == 0:
            tl.store(d_bias, tl.sum(total, 0))
    else:
        first = (program - weight_programs).to(tl.int64) * ROWS
        row = first + tl.arange(0, ROWS)
        # Sequences that share a row: their gradients are summed before the product with w.
        factor = tl.zeros([ROWS], tl.float32)
        hits = tl.zeros([ROWS], tl.int32)
        for s in range(0, S, SCAN):
            sequence = s + tl.arange(0, SCAN)
            index = tl.load(last_index + sequence, mask=sequence < S, other=-1)
            mine = (index >= first) & (index < first + ROWS)
            if tl.max(mine.to(tl.int32), 0) > 0:
                g = tl.load(grad_scores + sequence, mask=mine, other=0.0)
                same = index[None, :] == row[:, None]
                factor += tl.sum(tl.where(same, g[None, :], 0.0), 1)
                hits = tl.maximum(hits, tl.max(same.to(tl.int32), 1))
        to = d_hidden + row[:, None] * H
        if tl.max(hits, 0) > 0:
            for h in range(0, H, BLOCK_H):
                column = h + tl.arange(0, BLOCK_H)
                inside = column < H
                w = tl.load(weight + column.to(tl.int64) * stride_w, mask=inside, other=0.0).to(tl.float32)
                # Not 0 * w: a row that no sequence ends in stays 0 whatever w holds.
                value = tl.where(hits[:, None] > 0, factor[:, None] * w[None, :], 0.0)
                mask = (row < T)[:, None] & inside[None, :]
                tl.store(to + column[None, :], value.to(d_hidden.dtype.element_ty), mask=mask)
        else:
            zeros = tl.zeros([ROWS, BLOCK_H], d_hidden.dtype.element_ty)
            for h in range(0, H, BLOCK_H):
                column = h + tl.arange(0, BLOCK_H)
                mask = (row < T)[:, None] & (column < H)[None, :]
                tl.store(to + column[None, :], zeros, mask=mask)


def forward(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    has_teacher: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and pairs of S sequences, in one launch of a program per group.

    hidden: [T, H] and weight: [H], bfloat16, float16 or float32 of any strides; last_index: [S] int64;
    bias: one number or None; group_offsets: [G + 1] int64 from 0 to S; has_teacher: [G] bool.
    Gives scores, pair_loss, margin and slope, [S] float32 each, as the module states them. Equal rows of hidden get
    equal scores, to the bit. Values are not checked: an index outside hidden is a fault, as in every kernel.
    """
    sequences, width = last_index.shape[0], hidden.shape[1]
    scores, pair_loss, margins, slopes = (hidden.new_empty(sequences, dtype=torch.float32) for _ in range(4))
    groups = has_teacher.shape[0]
    if groups and sequences:
        block = min(1024, max(16, triton.next_power_of_2(width)))
        _forward_kernel[(groups,)](
            hidden,
            hidden.stride(0),
            hidden.stride(1),
            last_index.contiguous(),
            weight,
            weight.stride(0),
            bias,
            group_offsets.contiguous(),
            has_teacher.contiguous(),
            scores,
            pair_loss,
            margins,
            slopes,
            width,
            HAS_BIAS=bias is not None,
            ROWS=_GROUP_ROWS,
            BLOCK_H=block,
            # One warp for each of the 16 rows.
            num_warps=16 if block == 1024 else 8 if block >= 256 else 4,
        )
    return scores, pair_loss, margins, slopes


def backward(grad_scores: Tensor, hidden: Tensor, last_index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scores, in one launch; grad_scores: [S] float32, the rest as in `forward`.

    Gives d_hidden [T, H] in the dtype of hidden, zero but in the rows of last_index, whose duplicates add up;
    d_weight [H], summed in float32, in the dtype of weight; d_bias [] float32.
    """
    tokens, width = hidden.shape
    sequences = last_index.shape[0]
    d_hidden = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.empty(width, dtype=weight.dtype, device=hidden.device)
    d_bias = torch.empty((), dtype=torch.float32, device=hidden.device)
    # One cache line of a row is the least that a gather should fetch.
    columns = 128 // hidden.element_size()
    weight_programs = triton.cdiv(width, columns)
    block = min(1024, max(16, triton.next_power_of_2(width)))
    _backward_kernel[(weight_programs + triton.cdiv(tokens, _OUT_ROWS),)](
        grad_scores.contiguous(),
        hidden,
        hidden.stride(0),
        hidden.stride(1),
        last_index.contiguous(),
        weight,
        weight.stride(0),
        d_hidden,
        d_weight,
        d_bias,
        tokens,
        width,
        sequences,
        weight_programs,
        ROWS=_OUT_ROWS,
        BLOCK_H=block,
        SCAN=_SCAN,
        GATHER_ROWS=_GATHER_ROWS,
        COLUMNS=columns,
        num_warps=8 if block >= 256 else 4,
    )
    return d_hidden, d_weight, d_bias
