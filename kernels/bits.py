"""Sums over the bits of tensors, by which weights are compared where only one side is at hand."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(tensor: Tensor) -> Tensor:
    """[rows] int64, of the bits of every row, on the tensor's device."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(integer).reshape(len(tensor), -1).sum(1, dtype=torch.int64)


def bit_sums(tensor: Tensor) -> Tensor:
    """[2] int64: the sum of row_sums(), and that of each times its place. They see rows that differ or were exchanged,
    but not two columns exchanged everywhere."""
    rows = row_sums(tensor)
    numbers = torch.arange(1, len(rows) + 1, device=rows.device)
    return torch.stack([rows.sum(), (rows * numbers).sum()])
