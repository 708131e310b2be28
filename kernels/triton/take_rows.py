"""The gradient of take_rows in Triton: a sum by segments of a sorted index, each by one program, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._shared import on_its_device

BLOCK = 1024  # columns of a program


@triton.jit
def _segment_sum_kernel(grad, order, offsets, out, columns, stride_row, stride_column, BLOCK: tl.constexpr):
    """out [N, columns]: row n is the sum of grad[order[i]] over offsets[n] <= i < offsets[n + 1], from the first on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        at = grad + tl.load(order + i) * stride_row + column.to(tl.int64) * stride_column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=inside)


@on_its_device
def backward(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """d x [rows, H] of the dtype of grad, contiguous, added up in fp32. grad: [R, H] of any strides; index: [R] int64.

    Nothing waits for the device: it sorts the index itself.
    """
    out = torch.empty(rows, grad.shape[1], dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    index, order = index.sort(stable=True)
    offsets = torch.searchsorted(index, torch.arange(rows + 1, device=index.device))
    grid = (rows, triton.cdiv(grad.shape[1], BLOCK))
    _segment_sum_kernel[grid](grad, order, offsets, out, grad.shape[1], *grad.stride(), BLOCK=BLOCK)
    return out
