"""The GPU side of rms_norm in Triton: one launch forward, one backward, whose weight gradients are added up after it.

A program has some whole rows. Backward's keep their share of d weight in registers; the shares are added up in their
order: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._shared import num_sms, on_its_device

# Numbers that a program holds of x at once, and programs of backward for each SM.
TILE, PROGRAMS = 4096, 2


@triton.jit
def _forward_kernel(
    x, weight, y, rstd, rows, stride, eps, shift, H: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, 1) / H + eps)
    w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32) + shift
    out = (values * r[:, None] * w[None, :]).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * H + column[None, :], out, mask=inside)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def _backward_kernel(
    grad,
    x,
    weight,
    rstd,
    d_x,
    d_weight,
    rows,
    own,
    stride,
    shift,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d_weight: [programs, H] fp32, of each program's `own` rows, a multiple of ROWS."""
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32) + shift
    d_w = tl.zeros((WIDTH,), tl.float32)
    first = tl.program_id(0) * own
    for start in range(first, tl.minimum(first + own, rows), ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < H)[None, :]
        at = row[:, None] * H + column[None, :]
        values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        normed = values * r[:, None]
        d_w += tl.sum(g * normed, 0)
        g = g * w[None, :]
        d = r[:, None] * (g - normed * (tl.sum(g * normed, 1) / H)[:, None])
        tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_weight + tl.program_id(0) * H + column, d_w, mask=column < H)


def _tile(H: int) -> dict[str, int]:
    """What the kernels are compiled for. Raises ValueError for rows that no program can hold."""
    width = triton.next_power_of_2(H)
    if width > 4 * TILE:
        raise ValueError(f"the Triton kernels of rms_norm have rows of at most {4 * TILE} numbers, got {H}")
    return {"H": H, "WIDTH": width, "ROWS": max(TILE // width, 1), "num_warps": 16 if width > TILE else 8}


def _rows(x: Tensor) -> Tensor:
    """x [rows, H] itself where the numbers of a row are neighbours, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


@on_its_device
def forward(x: Tensor, weight: Tensor, eps: float, shift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y [rows, H] of `dtype`, contiguous, r [rows] fp32). x: [rows, H] of any strides; weight: [H]."""
    x, tile = _rows(x), _tile(x.shape[1])
    rows, H = x.shape
    y = torch.empty(rows, H, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        _forward_kernel[grid](x, weight.contiguous(), y, rstd, rows, x.stride(0), eps, shift, **tile)
    return y, rstd


@on_its_device
def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """(d x [rows, H], d weight [H]) in the dtypes of what they belong to, contiguous. grad: [rows, H], any strides."""
    x, tile = _rows(x), _tile(x.shape[1])
    rows, H = x.shape
    d_x = torch.empty(rows, H, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, tile["ROWS"])
    own = triton.cdiv(tiles, PROGRAMS * num_sms(x.device)) * tile["ROWS"]
    programs = triton.cdiv(rows, own) if rows else 0
    d_weight = torch.empty(programs, H, dtype=torch.float32, device=x.device)
    if rows:
        shares = (d_x, d_weight, rows, own, x.stride(0), shift)
        _backward_kernel[(programs,)](grad.contiguous(), x, weight.contiguous(), rstd, *shares, **tile)
    return d_x, d_weight.sum(0).to(weight.dtype)
