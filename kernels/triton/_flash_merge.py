"""What kernels/flash puts together: two attentions of the same queries, and the gradients of two calls."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._prefix_walk import SCAN
from gadcore.kernels.triton._shared import on_its_device

TILE = 4096  # numbers of a program


@triton.jit
def _merge_kernel(
    out, lse, more, more_lse, to, to_lse, rows, T, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head) pairs. lse, more_lse, to_lse: [HEADS, T]. Where more_lse is -inf, more is not read."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < rows
    at_lse = (row % HEADS).to(tl.int64) * T + row // HEADS
    first = tl.load(lse + at_lse, mask=inside, other=0.0)
    second = tl.load(more_lse + at_lse, mask=inside, other=float("-inf"))
    largest = tl.maximum(first, second)
    both = largest + tl.log(tl.exp(first - largest) + tl.exp(second - largest))
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    mask = inside[:, None] & (column < D)[None, :]
    x = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(more + at, mask=mask & (second > float("-inf"))[:, None], other=0.0).to(tl.float32)
    merged = tl.exp(first - both)[:, None] * x + tl.exp(second - both)[:, None] * y
    tl.store(to + at, merged.to(to.dtype.element_ty), mask=mask)
    tl.store(to_lse + at_lse, both, mask=inside)


@triton.jit
def _add_rows_kernel(
    x, more, offsets, prompt_of, segments, of_prompts, T, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """x += more in the tokens of prompts that have responses, or in those of responses. x, more: [T, N]."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    # Segments that start at or before a token: its own is the last of them.
    started = tl.zeros((ROWS,), tl.int32)
    for first in range(0, segments, SCAN):
        k = first + tl.arange(0, SCAN)
        begins = tl.load(offsets + k, mask=k < segments, other=0)
        started += tl.sum(((begins[None, :] <= token[:, None]) & (k < segments)[None, :]).to(tl.int32), 1)
    segment = started - 1
    of_response = tl.load(prompt_of + segment, mask=inside, other=0) != segment
    followed = tl.load(prompt_of + segment + 1, mask=inside & (segment + 1 < segments), other=-1) == segment
    chosen = tl.where(of_prompts == 1, followed, of_response)
    mask = (inside & chosen)[:, None] & (column < N)[None, :]
    at = token[:, None] * N + column[None, :]
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + at, total.to(x.dtype.element_ty), mask=mask)


@on_its_device
def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse [H, T]) of the softmax over the keys of both. lse, more_lse: [H, T] float32; more_lse is -inf
    where a row sees no key there, and what `more` holds then is of no account."""
    T, heads, D = out.shape
    to, to_lse = torch.empty(out.shape, dtype=out.dtype, device=out.device), torch.empty_like(lse)
    width = triton.next_power_of_2(D)
    rows = max(TILE // width, 1)
    grid = (triton.cdiv(T * heads, rows),)
    given = (out.contiguous(), lse.contiguous(), more.contiguous(), more_lse.contiguous())
    _merge_kernel[grid](*given, to, to_lse, T * heads, T, HEADS=heads, D=D, WIDTH=width, ROWS=rows)
    return to, to_lse


@on_its_device
def add_rows(x: Tensor, more: Tensor, offsets: Tensor, prompt_of: Tensor, *, of_prompts: bool) -> None:
    """x += more, both [T, H, D] and contiguous, in the tokens of prompts that have responses alone, or in those
    of responses alone."""
    T, N = x.shape[0], x[0].numel()
    block = min(triton.next_power_of_2(N), 1024)
    rows = TILE // block
    grid = (triton.cdiv(T, rows), triton.cdiv(N, block))
    layout = (offsets.contiguous(), prompt_of.contiguous(), len(prompt_of))
    _add_rows_kernel[grid](x, more, *layout, int(of_prompts), T, N=N, ROWS=rows, BLOCK=block)
