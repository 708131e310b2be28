"""The binding of csrc/cuda/cast_copy.cu."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.cuda.native import Library

# As many as an SM holds at the registers that the kernel takes.
_BLOCKS_PER_SM = 4


class CopyTable(NamedTuple):
    """entries: int64, `copies` entries of eight numbers and then copies + 1 chunk starts, as csrc/cuda/cast_copy.cu
    reads them, on the device of the tensors whose addresses it holds. chunks: of all copies."""

    entries: Tensor
    copies: int
    chunks: int


def launch(library: Library, table: CopyTable, blocks: int | None = None) -> None:
    """Every copy of a table that gadcore.kernels.cast_copy made, in one launch that is not waited for.

    blocks: how many to launch at most; None fills the GPU. Raises RuntimeError where the launch fails.
    """
    if not table.copies:
        return
    device = table.entries.device
    if blocks is None:
        on_gpu = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        blocks = _BLOCKS_PER_SM * processors
    library.launch("cast_copy", device, table.entries.data_ptr(), table.copies, min(blocks, table.chunks))
