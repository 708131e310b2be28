"""Matrices in 8 or 4 bits, for weights that nobody trains: made once, and whole again for the time of a product.

    int8   w = q s / 127      a scale s, the largest of its entries, for every row
    nf4    w = NF4[q] s       of 16 values, with a scale for every 64 entries; of the scales, less their mean, 8 bits:
                              s = DYNAMIC[p] u + mean, with a u for every 256 of them (QLoRA, arXiv 2305.14314)

nf4 has the bytes that the package bitsandbytes gives it, and on CUDA its kernels make and read them. Elsewhere the
functions below do, which are what defines the format here: so nothing that is trained on a CPU needs the package, and
a test of this file's sums tests what such a run computes with. int8 is two operations of torch on any device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["int8", "nf4"]

# The quantiles of a normal distribution, 0 among them, that Dettmers et al. give (arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Entries that have a scale of their own, and scales that have.
BLOCK, SCALES_BLOCK = 64, 256


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix [N, K] of few bits.

    data: int8 [N, K], or nf4 uint8 [N, K / 2], the first of two entries in the upper bits. scales: of int8 float32 [N],
    of nf4 uint8, one a block of the entries row after row. steps: float32, one a block of scales, and mean: float32 [],
    of nf4 alone.
    """

    kind: Kind
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor
    steps: Tensor | None = None
    mean: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K] of a floating dtype: computed in float32, rounded once."""
        if self.kind == "int8":
            out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
            return torch.mul(self.data, (self.scales / 127)[:, None], out=out)
        return _dense_nf4(self, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """By field, those that there are."""
        fields = {"data": self.data, "scales": self.scales, "steps": self.steps, "mean": self.mean}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


def quantise(weight: Tensor, kind: Kind) -> Quantised:
    """The matrix [N, K], of any floating dtype, in few bits, on its device. ValueError for nf4 of an odd K;
    RuntimeError on CUDA without the package bitsandbytes."""
    shape = (weight.shape[0], weight.shape[1])
    if kind == "int8":
        wide = weight.float()
        scales = wide.abs().amax(1)
        # A row of zeros has any scale.
        data = (wide * (127 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round_().to(torch.int8)
        return Quantised(kind, shape, data, scales)
    if shape[1] % 2:
        raise ValueError(f"nf4 has two entries of a row in a byte, and this matrix is {list(shape)}")
    return _by_library(weight) if weight.is_cuda else _nf4(weight, shape)


def _nf4(weight: Tensor, shape: tuple[int, int]) -> Quantised:
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    codes = _nearest(_divided(blocks, absmax), _nf4_values(weight.device)).flatten()[: len(flat)]
    pairs = codes.view(shape[0], -1, 2)
    data = (pairs[..., 0] << 4 | pairs[..., 1]).to(torch.uint8)
    mean = absmax.mean()
    centred = absmax - mean
    groups = F.pad(centred, (0, -len(centred) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    steps = groups.abs().amax(1)
    places = _nearest(_divided(groups, steps), _dynamic_values(weight.device)).flatten()[: len(centred)]
    return Quantised("nf4", shape, data, places.to(torch.uint8), steps, mean)


def _divided(blocks: Tensor, largest: Tensor) -> Tensor:
    """Every row by its largest entry, one of zeros by anything."""
    return blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """The place, among ascending values, of the one that is nearest to each entry of x."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def _dense_nf4(weight: Quantised, dtype: torch.dtype) -> Tensor:
    if weight.data.is_cuda:
        return _dense_by_library(weight, dtype)
    size = weight.shape[0] * weight.shape[1]
    scales = _scales(weight)
    # Both values of a byte are looked up as one number of 8 bytes.
    both = _pairs(weight.data.device).view(torch.float64).index_select(0, weight.data.flatten().int())
    values = both.view(torch.float32)
    if size % BLOCK == 0:
        wide = values.view(-1, BLOCK).mul_(scales[:, None])
    else:
        wide = values.mul_(scales.repeat_interleave(BLOCK)[:size])
    return wide.view(weight.shape).to(dtype)


def _scales(weight: Quantised) -> Tensor:
    """float32 [blocks]: the largest entry of every block, as 8 bits have kept it."""
    assert weight.steps is not None and weight.mean is not None
    steps = weight.steps.repeat_interleave(SCALES_BLOCK)[: len(weight.scales)]
    return F.embedding(weight.scales.int(), _dynamic_values(weight.data.device)[:, None])[:, 0] * steps + weight.mean


def dynamic_values() -> list[float]:
    """The 256 values of the 8 bits, the finer spaced the smaller: 0, 1, and for the exponents -6 .. 0 of ten 1, 2,
    4 .. 64 evenly spaced fractions between 0.1 and 1, with either sign (arXiv 1511.04561, 2110.02861)."""
    fractions = [(power, 0.1 + 0.9 * (i + 0.5) / 2**power) for power in range(7) for i in range(2**power)]
    positive = [fraction * 10.0 ** (power - 6) for power, fraction in fractions]
    return sorted([*positive, *(-value for value in positive), 0.0, 1.0])


# Cached for good, so that no pass on a GPU copies them there; made as ordinary tensors, whatever mode they are first
# asked for in.
@functools.cache
def _dynamic_values(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(dynamic_values(), dtype=torch.float32, device=device)


@functools.cache
def _nf4_values(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(NF4, dtype=torch.float32, device=device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[512]: the two values of every byte."""
    with torch.inference_mode(False):
        values = _nf4_values(device)
        return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).flatten()


def _library() -> Any:
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise RuntimeError("nf4 on a GPU needs the package bitsandbytes: `pip install 'gadcore[nf4]'`") from error
    return library


def _by_library(weight: Tensor) -> Quantised:
    shape = (weight.shape[0], weight.shape[1])
    data, state = _library().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    assert state.state2.blocksize == SCALES_BLOCK
    return Quantised("nf4", shape, data.view(shape[0], -1), state.absmax, state.state2.absmax, state.offset)


def _dense_by_library(weight: Quantised, dtype: torch.dtype) -> Tensor:
    library = _library()
    device, (rows, columns) = weight.data.device, weight.shape
    of_scales = library.QuantState(
        absmax=weight.steps, blocksize=SCALES_BLOCK, code=_dynamic_values(device), dtype=torch.float32
    )
    state = library.QuantState(
        absmax=weight.scales,
        shape=torch.Size((rows, columns)),
        blocksize=BLOCK,
        quant_type="nf4",
        # It knows no float64.
        dtype=torch.float32 if dtype == torch.float64 else dtype,
        offset=weight.mean,
        state2=of_scales,
    )
    dense: Tensor = library.dequantize_4bit(weight.data.view(-1, 1), state)
    return dense.to(dtype)


def quantised_bytes(kind: Kind, rows: int, columns: int) -> int:
    """Bytes of a matrix [rows, columns] in few bits."""
    entries = rows * columns
    if kind == "int8":
        return entries + 4 * rows
    blocks = math.ceil(entries / BLOCK)
    return entries // 2 + blocks + 4 * math.ceil(blocks / SCALES_BLOCK) + 4
