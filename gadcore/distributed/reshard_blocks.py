"""Where an engine's parameters come from in the trainer's: found by watching the engine's own loader.

The loader is given tensors of the trainer's names and shapes that hold nothing (device "meta"), and every copy that it
makes of a part of one into a part of a parameter is noted and not done. So fused projections, slices of tensor
parallelism and padded vocabularies come out as the engine has them, for every model that its loader knows, without
memory, and the parameters keep their values. It works as well where the engine's model is on "meta" itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Rows and columns of an engine's parameter that are rows and columns of one of the trainer's.

    A tensor of more than two dimensions has the product of all but the first as its columns, a vector has one column.
    """

    target: str
    row: int
    column: int
    source: str
    source_row: int
    source_column: int
    rows: int
    columns: int


class NotACopy(RuntimeError):
    """The engine's loader computes what it stores, or stores a part that is no block."""


def matrix(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor with two dimensions: rows, and all else."""
    return tensor.reshape(len(tensor), width(tuple(tensor.shape))) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def width(shape: Shape) -> int:
    """Columns of a tensor of that shape."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


def find_blocks(
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype = torch.float32,
) -> list[Block]:
    """The blocks of all `parameters` of an engine, in the order in which its loader stores them.

    load: takes named tensors into the parameters, as load_weights() of vLLM's models. shapes: the trainer's parameters.
    Raises NotACopy for what is not copied as it is, and RuntimeError where an element of a parameter is stored twice or
    never, or a tensor of the trainer's is stored nowhere.
    """
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    watched = _Watched(parameters, sources)
    with torch.no_grad(), watched:
        load(iter(sources.items()))
    check_covered({name: tuple(p.shape) for name, p in parameters.items()}, watched.blocks, watched.fills)
    if unused := sorted(shapes.keys() - {block.source for block in watched.blocks}):
        raise RuntimeError(f"the engine's loader stores the trainer's {unused[0]} nowhere")
    return watched.blocks


class _Watched(TorchDispatchMode):
    """Notes copies from `sources` into `parameters`, and constants that are stored there, and does neither."""

    def __init__(self, parameters: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.fills: list[Block] = []
        self._parameters = {_storage(p): (name, p) for name, p in parameters.items()}
        self._sources = {_storage(s): (name, s) for name, s in sources.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return func(*args, **(kwargs or {}))
        target = self._parameters.get(_storage(first))
        if target is not None and func is torch.ops.aten.copy_.default:
            self._copy(*target, first, args[1])
            return first
        if target is not None and func in _FILLS:
            name, p = target
            row, column, rows, columns = _place(name, p, first)
            self.fills.append(Block(name, row, column, "", 0, 0, rows, columns))
            return first
        if func in _SAME_VALUES and _storage(first) in self._sources:
            return first
        if func._schema.is_mutable and (target is not None or _storage(first) in self._sources):
            name, _ = target or self._sources[_storage(first)]
            raise NotACopy(f"the engine's loader changes values of {name} ({func})")
        return func(*args, **(kwargs or {}))

    def _copy(self, name: str, p: Tensor, into: Tensor, what: Tensor) -> None:
        found = self._sources.get(_storage(what))
        if found is None:
            raise NotACopy(f"what the engine's loader stores in {name} is no part of the trainer's weights")
        source, whole = found
        row, column, rows, columns = _place(name, p, into)
        source_row, source_column, source_rows, source_columns = _place(source, whole, what)
        if (rows, columns) != (source_rows, source_columns):
            raise NotACopy(
                f"the engine's loader stores {source_rows} x {source_columns} of the trainer's {source} as "
                f"{rows} x {columns} of {name}"
            )
        self.blocks.append(Block(name, row, column, source, source_row, source_column, rows, columns))


_FILLS = {
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
}
# Their result is a copy that is stored later.
_SAME_VALUES = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(name: str, whole: Tensor, part: Tensor) -> tuple[int, int, int, int]:
    """(row, column, rows, columns) of a view of a contiguous tensor. Raises NotACopy where it is no block of it."""
    columns = width(tuple(whole.shape))
    offset = int(part.storage_offset()) - int(whole.storage_offset())
    if not part.numel():
        return 0, 0, 0, 0
    sizes = [(size, stride) for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1]
    # What is contiguous from the last dimension on is one run; a row's stride may be above it.
    run = 1
    while sizes and sizes[-1][1] == run and (run * sizes[-1][0] <= columns or run % columns == 0):
        run *= sizes.pop()[0]
    row, column = divmod(offset, columns)
    if not sizes and run <= columns and column + run <= columns:
        return row, column, 1, run
    if not sizes and run % columns == 0 and column == 0:
        return row, 0, run // columns, columns
    if len(sizes) == 1 and sizes[0][1] == columns and column + run <= columns:
        return row, column, sizes[0][0], run
    raise NotACopy(f"the engine's loader uses a part of {name} that is no block of rows and columns")


def check_covered(shapes: Mapping[str, Shape], blocks: Iterable[Block], fills: Iterable[Block] = ()) -> None:
    """Raises RuntimeError where an element of a parameter is written by no block, or by two.

    fills: what holds a constant that is nobody's weight, as the padding of a vocabulary.
    """
    by_target: dict[str, list[Block]] = {name: [] for name in shapes}
    for block in (*blocks, *fills):
        if block.rows and block.columns:
            by_target[block.target].append(block)
    for name, found in by_target.items():
        rows, columns = shapes[name][0] if shapes[name] else 1, width(shapes[name])
        cuts = sorted({0, rows, *(b.row for b in found), *(b.row + b.rows for b in found)})
        begin: dict[int, list[Block]] = {}
        for block in found:
            begin.setdefault(block.row, []).append(block)
        open_blocks: list[Block] = []
        for top, bottom in zip(cuts, cuts[1:], strict=False):
            open_blocks = [b for b in open_blocks if b.row + b.rows > top] + begin.get(top, [])
            at = 0
            for block in sorted(open_blocks, key=lambda b: b.column):
                if block.column < at:
                    raise RuntimeError(f"rows {top} to {bottom - 1} of {name} are written twice")
                if block.column > at:
                    break
                at += block.columns
            if at != columns:
                raise RuntimeError(f"rows {top} to {bottom - 1} of {name} are written by no weight")
