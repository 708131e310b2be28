"""The GPU side of rotary in Triton: one launch each way, out of place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._shared import on_its_device

# Numbers of each half that a program turns: 16 for a thread of its four warps, two reads of 16 bytes in 16 bits.
TILE = 2048


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    stride_x,
    stride_cos,
    stride_sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Rows are (token, head) pairs, token by token: the cosines of a token are read from memory once for its heads.

    stride_x: (of a token, of a head, of an element); stride_cos, stride_sin: (of a token, of an element). WIDTH: HALF
    up to a power of two. out: contiguous.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None]
    if HALF != WIDTH:
        inside = inside & (column < HALF)[None, :]
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    at = x + token[:, None] * stride_x[0] + head[:, None] * stride_x[1] + column[None, :] * stride_x[2]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF * stride_x[2], mask=inside, other=0.0).to(tl.float32)
    at_cos = cos + token[:, None] * stride_cos[0] + column[None, :] * stride_cos[1]
    at_sin = sin + token[:, None] * stride_sin[0] + column[None, :] * stride_sin[1]
    cos_low = tl.load(at_cos, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(at_cos + HALF * stride_cos[1], mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(at_sin, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(at_sin + HALF * stride_sin[1], mask=inside, other=0.0).to(tl.float32)
    if BACK:
        # Each half of sin goes back to where its product came from.
        turned_low, turned_high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    else:
        turned_low, turned_high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    to = out + row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
    tl.store(to, turned_low.to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, turned_high.to(out.dtype.element_ty), mask=inside)


@on_its_device
def forward(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x turned by the angle of every token [T, H, D], contiguous, of the dtype of x; by its opposite where `back`.

    x: [T, H, D], fp32, bf16 or fp16; cos, sin: [T, D] of any floating dtype; all of any strides. Nothing is launched
    where there is nothing to turn.
    """
    T, heads, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    width = triton.next_power_of_2(D // 2)
    rows = max(TILE // width, 1)
    _rotary_kernel[(triton.cdiv(T * heads, rows),)](
        x,
        cos,
        sin,
        out,
        T * heads,
        x.stride(),
        cos.stride(),
        sin.stride(),
        HEADS=heads,
        HALF=D // 2,
        WIDTH=width,
        ROWS=rows,
        BACK=back,
    )
    return out
