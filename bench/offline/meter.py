"""Counts what Triton kernels move and compute under the interpreter, and the aten operators around them.

    with metered() as meter:
        some_op(...)
    for row in meter.rows: ...

Of a Triton launch, in bytes:
- requested: what its lanes ask for, masked-off ones left out.
- sectors: 32-byte sectors of every tile operation, each once an operation: what crosses from L2 to the SMs (no L1).
- unique: sectors of the whole launch, each once: what memory must deliver and take if the cache were perfect.
- modelled: what memory delivers and takes in front of an L2 of `Cache.bytes`. A MODEL, not a measurement: programs
  start in launch order, as many at once as the SMs hold, and take turns by one tile operation; the least recently used
  2 KiB of the cache go first; stores stay in it until they are pushed out; a launch finds it empty and leaves it
  written back.

Of an aten operator only the least is known: every byte of its inputs once and of its outputs once, in all columns.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.offline.interpreter import Kind, Observer, observe

SECTOR = 32
# 64 sectors, so that those of a line that are in the cache make up one 64-bit number.
LINE_SECTORS = 64

# A tile operation of a program: lines, the sectors touched in each of them as a bit mask, and whether it is a store.
Operation = tuple[np.ndarray, np.ndarray, bool]


@dataclass(frozen=True)
class Cache:
    """L2 and SMs of the model; an H100's by default. resident: programs that an SM holds at once, by kernel, else 1."""

    bytes: int = 50 << 20
    multiprocessors: int = 132
    resident: dict[str, int] = field(default_factory=dict)


@dataclass
class Traffic:
    """Bytes and operations of one launch, or of one aten operator (kernel "aten.<name>", programs 0)."""

    kernel: str
    programs: int = 0
    requested_load: int = 0
    requested_store: int = 0
    sector_load: int = 0
    sector_store: int = 0
    unique_load: int = 0
    unique_store: int = 0
    modelled_load: int = 0
    modelled_store: int = 0
    flops: int = 0

    @property
    def unique(self) -> int:
        return self.unique_load + self.unique_store

    @property
    def modelled(self) -> int:
        return self.modelled_load + self.modelled_store


class _Storage:
    """Sectors of one storage that a launch has loaded and stored so far."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        first, last = storage.data_ptr() // SECTOR, (storage.data_ptr() + storage.nbytes() - 1) // SECTOR
        self.first, self.end = first, last + 1
        self.loaded, self.stored = (np.zeros(last + 1 - first, dtype=bool) for _ in range(2))


class Meter(Observer):
    """The observer behind `metered`. rows: launches and aten operators, in order."""

    def __init__(self, cache: Cache) -> None:
        self.rows: list[Traffic] = []
        self._cache = cache
        self._storages: list[_Storage] = []
        self._starts = np.zeros(0, dtype=np.int64)
        # By program, in launch order, whatever order the interpreter runs them in.
        self._traces: dict[int, list[Operation]] = {}
        self._trace: list[Operation] = []

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[torch.Tensor]) -> None:
        self.rows.append(Traffic(kernel, math.prod(grid)))
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.untyped_storage().nbytes()
        }
        self._storages = [_Storage(storages[base]) for base in sorted(storages)]
        self._starts = np.array([storage.first for storage in self._storages], dtype=np.int64)
        self._traces = {}

    def program(self, index: int) -> None:
        self._trace = self._traces.setdefault(index, [])

    def access(self, kind: Kind, addresses: np.ndarray, itemsize: int) -> None:
        row, size = self.rows[-1], addresses.size * itemsize
        if not size:
            return
        sectors = _distinct((addresses // SECTOR).astype(np.int64))
        crossing = len(sectors) * SECTOR
        # An atomic is read and written where the data lie: both directions.
        if kind != "store":
            row.requested_load += size
            row.sector_load += crossing
            self._mark(sectors, stored=False)
        if kind != "load":
            row.requested_store += size
            row.sector_store += crossing
            self._mark(sectors, stored=True)
        lines = sectors // LINE_SECTORS
        starts = np.flatnonzero(np.diff(lines, prepend=-1))
        masks = np.left_shift(np.uint64(1), (sectors % LINE_SECTORS).astype(np.uint64))
        self._trace.append((lines[starts], np.bitwise_or.reduceat(masks, starts), kind == "store"))

    def _mark(self, sectors: np.ndarray, stored: bool) -> None:
        which = np.searchsorted(self._starts, sectors, side="right") - 1
        for i in np.unique(which):
            storage = self._storages[i]
            offsets = sectors[which == i] - storage.first
            (storage.stored if stored else storage.loaded)[offsets] = True

    def dot(self, rows: int, columns: int, depth: int) -> None:
        self.rows[-1].flops += 2 * rows * columns * depth

    def finished(self) -> None:
        row = self.rows[-1]
        row.unique_load = SECTOR * sum(int(storage.loaded.sum()) for storage in self._storages)
        row.unique_store = SECTOR * sum(int(storage.stored.sum()) for storage in self._storages)
        touched = SECTOR * sum(int((storage.loaded | storage.stored).sum()) for storage in self._storages)
        if touched <= self._cache.bytes and touched == row.unique:
            # All of it fits, and nothing is loaded that this launch has stored: no need to play it through.
            row.modelled_load, row.modelled_store = row.unique_load, row.unique_store
        else:
            traces = [self._traces[index] for index in sorted(self._traces)]
            slots = self._cache.multiprocessors * self._cache.resident.get(row.kernel, 1)
            row.modelled_load, row.modelled_store = _simulate(traces, slots, self._cache.bytes)
        self._storages, self._traces, self._trace = [], {}, []


def _distinct(sectors: np.ndarray) -> np.ndarray:
    """Sorted and without repetition. Tiles are most often in order already, which saves the sorting."""
    steps = np.diff(sectors)
    if (steps < 0).any():
        return np.unique(sectors)
    return sectors[np.concatenate([[True], steps > 0])]


def _slot(waiting: Iterator[list[Operation]]) -> Iterator[Operation]:
    """A place on an SM: the tile operations of one program after the other, each the next that waits."""
    for trace in waiting:
        yield from trace


def _simulate(traces: list[list[Operation]], slots: int, capacity: int) -> tuple[int, int]:
    """Bytes that memory delivers and takes; see the module's docstring for the model."""
    cached: OrderedDict[int, list[int]] = OrderedDict()  # line -> [sectors present, sectors to be written back]
    used = delivered = taken = 0
    waiting = iter(traces)
    running = [_slot(waiting) for _ in range(slots)]
    while running:
        still = []
        for slot in running:
            operation = next(slot, None)
            if operation is None:
                continue
            still.append(slot)
            lines, masks, store = operation
            for line, mask in zip(lines.tolist(), masks.tolist(), strict=True):
                entry = cached.get(line)
                if entry is None:
                    entry = cached[line] = [0, 0]
                else:
                    cached.move_to_end(line)
                new = mask & ~entry[0]
                if new:
                    entry[0] |= new
                    used += new.bit_count()
                    if not store:
                        delivered += new.bit_count()
                if store:
                    entry[1] |= mask
            while used * SECTOR > capacity:
                _, (present, dirty) = cached.popitem(last=False)
                used -= present.bit_count()
                taken += dirty.bit_count()
        running = still
    taken += sum(dirty.bit_count() for _, dirty in cached.values())
    return delivered * SECTOR, taken * SECTOR


class _Aten(TorchDispatchMode):
    """Adds the aten operators to a meter's rows. Views and allocations move nothing."""

    FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense", "lift_fresh", "_unsafe_view"}
    # Their first argument is only written.
    OVERWRITING = {"copy_", "fill_", "zero_"}
    PRODUCTS = {"mm", "addmm"}

    def __init__(self, rows: list[Traffic]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, schema = func._schema.name.split("::")[1], func._schema
        out = _product(args, kwargs) if name in self.PRODUCTS else func(*args, **kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if view or name in self.FREE:
            return out
        written_only = {id(args[0])} if name in self.OVERWRITING else set()
        if name == "addmm" and kwargs.get("beta", 1) == 0:
            written_only.add(id(args[0]))
        elif "out" in kwargs and not any(kwargs["out"] is argument for argument in args):
            written_only.add(id(kwargs["out"]))
        read = {
            id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and id(t) not in written_only
        }
        load = sum(_bytes(tensor) for tensor in read.values())
        store = sum(_bytes(tensor) for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor))
        columns = (load, store) * 4
        self.rows.append(
            Traffic(f"aten.{name}", 0, *columns, flops=_product_flops(args) if name in self.PRODUCTS else 0)
        )
        return out


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _factors(args: Any) -> list[torch.Tensor]:
    """The factors of mm or addmm, and before them what is added."""
    return [argument for argument in args if isinstance(argument, torch.Tensor)]


def _product_flops(args: Any) -> int:
    *_, a, b = _factors(args)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _product(args: Any, kwargs: Any) -> torch.Tensor:
    """mm or addmm, in float32: from 16 bits into float32 PyTorch has them on CUDA only, and into 16 bits it is slow."""
    *added, a, b = _factors(args)
    product = kwargs.get("alpha", 1) * (a.float() @ b.float())
    beta = kwargs.get("beta", 1)
    if added and beta:
        product += beta * added[0]
    if "out" in kwargs:
        return kwargs["out"].copy_(product)
    wanted = [argument for argument in args if isinstance(argument, torch.dtype)]
    return product.to(wanted[0] if wanted else a.dtype)


@contextmanager
def metered(cache: Cache | None = None) -> Iterator[Meter]:
    """Meters the Triton launches and aten operators of the block."""
    meter = Meter(cache or Cache())
    with observe(meter), _Aten(meter.rows):
        yield meter
