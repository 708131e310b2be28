"""Many copies, each with a cast, as one launch: target_i = source_i, rounded to target_i's dtype.

How the trainer's weights go into the rollout engine: shards into slices of fused tensors, fp32 into bf16. Casts are
between float32, bfloat16 and float16, rounded to the nearest, ties to even; a value beyond the target's range becomes
infinite, a NaN stays a NaN. Copies within a dtype, any dtype, keep every bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.cuda import native
from gadcore.kernels.cuda.cast_copy import CopyTable, launch

Impl = Literal["auto", "reference", "cuda"]

Pair = tuple[Tensor, Tensor]

# The numbers of csrc/cuda/cast_copy.cu.
_CONVERSIONS = {
    (torch.float32, torch.bfloat16): 0,
    (torch.float32, torch.float16): 1,
    (torch.bfloat16, torch.float32): 2,
    (torch.float16, torch.float32): 3,
    (torch.bfloat16, torch.float16): 4,
    (torch.float16, torch.bfloat16): 5,
}
_COPY = 2 * len(_CONVERSIONS)
_CHUNK_UNITS = 2048


def cast_copy(pairs: Sequence[Pair], impl: Impl = "auto") -> None:
    """Copies every source into its target, outside autograd. For copies that repeat, keep a `CastCopy`.

    pairs: (source, target), each of one shape, all on one device; the last dimension of both contiguous, the others
    of any strides, so that a target may be a slice of a fused tensor and a source an expanded row.
    impl: "cuda" is one launch, however many pairs there are; "auto" takes it on a GPU where it was built, else
    "reference", which is target.copy_(source) for each.
    Raises ValueError for pairs that do not fit, naming them by their place in `pairs`: different shapes, devices,
    dtypes without a cast between them, strides, or a target that overlaps itself, another one, or a source.
    RuntimeError for an `impl` that is not there.
    """
    CastCopy(pairs, impl)()


class CastCopy:
    """Copies that were checked and planned once; calling it does them, with the values that the sources have then.

    It holds the tensors, and their storage must stay where it is: `resize_` and `set_` are not noticed.
    Arguments and errors are those of `cast_copy`. impl: the one that was chosen.
    """

    def __init__(self, pairs: Sequence[Pair], impl: Impl = "auto") -> None:
        self.pairs = [(source.detach(), target.detach()) for source, target in pairs]
        check(self.pairs)
        device = self.pairs[0][0].device if self.pairs else torch.device("cpu")
        self.impl = _choose(impl, device)
        self._table = copy_table(self.pairs) if self.impl == "cuda" else None

    @torch.no_grad()
    def __call__(self) -> None:
        if self._table is not None:
            launch(native.require("cast_copy"), self._table)
            return
        for source, target in self.pairs:
            target.copy_(source)


def _choose(impl: Impl, device: torch.device) -> Literal["reference", "cuda"]:
    if impl == "reference":
        return "reference"
    if impl == "auto":
        return "cuda" if device.type == "cuda" and native.available("cast_copy") else "reference"
    if impl != "cuda":
        raise ValueError(f'impl must be "auto", "reference" or "cuda", is {impl!r}')
    native.require("cast_copy")
    if device.type != "cuda":
        raise ValueError(f'impl="cuda" needs tensors on a GPU, got {device}')
    return "cuda"


# --- what a pair covers ----------------------------------------------------------------------------------------------


class _Region(NamedTuple):
    """Rows of a tensor, in bytes."""

    start: int
    rows: int
    stride: int
    bytes: int

    @property
    def end(self) -> int:
        return self.start + (self.rows - 1) * self.stride + self.bytes


def _regions(*tensors: Tensor) -> Iterator[tuple[_Region, ...]]:
    """Tensors of one shape, contiguous in the last dimension, in rows: as few as merging dimensions in all allows."""
    if not tensors[0].numel():
        return
    dims: list[list[int]] = []  # [size, a stride for each tensor], innermost first
    for axis in reversed(range(tensors[0].dim())):
        size = tensors[0].shape[axis]
        strides = [tensor.stride(axis) for tensor in tensors]
        if size == 1:
            continue
        if dims and all(outer == dims[-1][0] * inner for outer, inner in zip(strides, dims[-1][1:], strict=True)):
            dims[-1][0] *= size
        else:
            dims.append([size, *strides])
    if not dims or any(stride != 1 for stride in dims[0][1:]):
        dims.insert(0, [1] * (1 + len(tensors)))
    columns = dims[0][0]
    rows, *row_strides = dims[1] if len(dims) > 1 else [1] + [0] * len(tensors)
    for position in itertools.product(*(range(size) for size, *_ in dims[2:])):
        regions = []
        for i, tensor in enumerate(tensors):
            item = tensor.element_size()
            offset = sum(at * dim[1 + i] for at, dim in zip(position, dims[2:], strict=True))
            regions.append(_Region(tensor.data_ptr() + offset * item, rows, row_strides[i] * item, columns * item))
        yield tuple(regions)


def _overlap(a: _Region, b: _Region) -> bool:
    """Whether two regions share a byte."""
    if a.rows > b.rows:
        a, b = b, a
    stride = max(b.stride, 1)

    def shared(start: int, first: int) -> bool:
        # Of b's rows from `first` on, the first that ends after this row of a begins.
        row = max(first, (start - b.bytes - b.start) // stride + 1)
        return row < b.rows and b.start + row * stride < start + a.bytes

    if a.stride == b.stride:
        # Only the distance of two rows matters: that of b's row j and a's row i is that of row j - i and row 0.
        return shared(a.start, 1 - a.rows)
    return any(shared(a.start + row * a.stride, 0) for row in range(a.rows))


def _check_overlaps(regions: Iterable[tuple[_Region, int, bool]]) -> None:
    """Raises ValueError where a target's region shares a byte with any other one. (region, pair, whether a target)."""
    open_regions: list[tuple[_Region, int, bool]] = []
    for region, pair, is_target in sorted(regions):
        open_regions = [entry for entry in open_regions if entry[0].end > region.start]
        for other, other_pair, other_is_target in open_regions:
            if (is_target or other_is_target) and _overlap(other, region):
                names = [
                    f"the {'target' if target else 'source'} of pair {at}"
                    for at, target in ((other_pair, other_is_target), (pair, is_target))
                ]
                raise ValueError(f"{names[0]} overlaps {names[1]}")
        open_regions.append((region, pair, is_target))


def check(pairs: Sequence[Pair]) -> None:
    """Raises ValueError where pairs are not what `cast_copy` takes."""
    regions: list[tuple[_Region, int, bool]] = []
    for i, (source, target) in enumerate(pairs):
        if source.shape != target.shape:
            raise ValueError(f"pair {i}: the source is {list(source.shape)}, the target {list(target.shape)}")
        devices = {source.device, target.device, pairs[0][0].device}
        if len(devices) > 1:
            raise ValueError(f"pair {i}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
        if source.dtype != target.dtype and (source.dtype, target.dtype) not in _CONVERSIONS:
            raise ValueError(f"pair {i}: there is no cast from {source.dtype} to {target.dtype}")
        for name, tensor in (("source", source), ("target", target)):
            if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(f"pair {i}: the last dimension of the {name} must be contiguous")
        for (region,) in _regions(target):
            if region.rows > 1 and region.stride < region.bytes:
                raise ValueError(f"pair {i}: the rows of the target overlap each other")
            regions.append((region, i, True))
        for (region,) in _regions(source):
            # The rows of an expanded source are one.
            regions.append((region if region.stride else region._replace(rows=1), i, False))
    _check_overlaps(regions)


# --- the table that the kernel reads ---------------------------------------------------------------------------------


def copy_table(pairs: Sequence[Pair]) -> CopyTable:
    """The table of checked pairs, on their device."""
    entries: list[tuple[int, ...]] = []
    for source, target in pairs:
        for from_, to in _regions(source, target):
            if source.dtype == target.dtype:
                entries += _copy_entries(from_, to)
            else:
                entries += _cast_entries(from_, to, source.dtype, target.dtype)
    # Within a chunk the kernel counts units in 32 bits; rows of a single copy have no such limit.
    assert all(per_row == units or per_row < 2**31 for *_, per_row, units, _ in entries)
    units = [entry[-2] for entry in entries]
    starts = list(itertools.accumulate((-(-n // _CHUNK_UNITS) for n in units), initial=0))
    device = pairs[0][0].device if pairs else None
    numbers = torch.tensor([*itertools.chain.from_iterable(entries), *starts], dtype=torch.int64, device=device)
    return CopyTable(numbers, len(entries), starts[-1])


def _copy_entries(source: _Region, target: _Region) -> Iterator[tuple[int, ...]]:
    """Of a copy within a dtype: the widest elements that addresses and strides allow, then what is left of each row."""
    done = 0
    while done < source.bytes:
        addresses = (source.start + done, target.start + done, source.stride, target.stride)
        element = math.gcd(16, *addresses)
        if element > source.bytes - done:
            element = math.gcd(element, source.bytes - done)
        per_row = (source.bytes - done) // element
        kind = _COPY + element.bit_length() - 1
        strides = (source.stride // element, target.stride // element)
        yield (*addresses[:2], *strides, 1, per_row, per_row * source.rows, kind)
        done += per_row * element


def _cast_entries(
    source: _Region, target: _Region, source_dtype: torch.dtype, target_dtype: torch.dtype
) -> Iterator[tuple[int, ...]]:
    """Of a cast: vectors of 16 bytes of the wider type where addresses and strides allow them, then single elements."""
    sizes = (source_dtype.itemsize, target_dtype.itemsize)
    kind = 2 * _CONVERSIONS[source_dtype, target_dtype]
    strides = (source.stride // sizes[0], target.stride // sizes[1])
    columns = source.bytes // sizes[0]
    vector = 16 // max(sizes)
    by_vectors = all(
        address % (vector * size) == 0
        for region, size in ((source, sizes[0]), (target, sizes[1]))
        for address in (region.start, region.stride)
    )
    done = columns // vector * vector if by_vectors else 0
    if done:
        per_row = done // vector
        yield (source.start, target.start, *strides, vector, per_row, per_row * source.rows, kind + 1)
    if done < columns:
        per_row = columns - done
        starts = (source.start + done * sizes[0], target.start + done * sizes[1])
        yield (*starts, *strides, 1, per_row, per_row * source.rows, kind)
