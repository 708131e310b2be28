"""From the trainer's shards to the engine's: who sends which rows to whom, planned once, each byte moved once.

The trainer cuts every parameter by rows over the ranks of a mesh (FSDP2), once a replica (HSDP); the engine cuts some
by rows, some by columns, and keeps some whole (gadcore.distributed.reshard_blocks finds how). What a rank's engine
needs and the rank has is copied; the rest comes from the one rank of its own replica that has it. There is no
gathering: a rank receives what it stores and does not have, which is the least that can be.

A plan is plain numbers. It needs no process and no weight: a layout of any number of ranks can be planned anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from gadcore.distributed.reshard_blocks import Block, Shape, width

# Of what a rank sends, or receives, at a time: large enough for a link, small beside a layer.
BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Mesh:
    """ranks: [replicas][shards], who has which rows of every parameter: shard i has the i-th of equal chunks, as FSDP2
    cuts them (the last ones may be shorter, or empty)."""

    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Mesh:
        """Of a device mesh of one dimension, or of two: replicas and shards."""
        ranks = mesh.mesh.reshape(-1, mesh.mesh.shape[-1])
        return cls(tuple(tuple(row) for row in ranks.tolist()))

    @classmethod
    def even(cls, shards: int, replicas: int = 1) -> Mesh:
        """The mesh that gadcore makes of replicas * shards ranks."""
        return cls(tuple(tuple(range(r * shards, (r + 1) * shards)) for r in range(replicas)))

    @property
    def shards(self) -> int:
        return len(self.ranks[0])

    @property
    def size(self) -> int:
        """Ranks in all."""
        return len(self.ranks) * self.shards

    def chunk(self, rows: int) -> int:
        """Rows of a shard of a parameter with that many."""
        return -(-rows // self.shards)

    def replica_of(self) -> dict[int, tuple[int, ...]]:
        """Of every rank, those that have a whole copy with it, by shard."""
        return {rank: row for row in self.ranks for rank in row}


class Piece(NamedTuple):
    """A block that one rank has whole. unit: of the exchange, see Plan."""

    source: int
    target: int
    unit: int
    block: Block


@dataclass(frozen=True)
class Bucket:
    """What is exchanged at a time: units begin .. end - 1, all of one dtype on the wire.

    idle: no rank sends any of it, each has what it needs.
    """

    begin: int
    end: int
    dtype: torch.dtype
    idle: bool


@dataclass(frozen=True)
class Layout:
    """What a plan is made for.

    shapes, dtypes: of the trainer's parameters, whole, in their order. engine_dtypes: of the engine's parameters.
    blocks: of every rank's engine, by rank.
    """

    mesh: Mesh
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    engine_dtypes: Mapping[str, torch.dtype]
    blocks: Sequence[Sequence[Block]]

    @property
    def stored(self) -> dict[str, torch.dtype]:
        """The engine's dtypes by the trainer's names."""
        return {block.source: self.engine_dtypes[block.target] for blocks in self.blocks for block in blocks}

    def wire(self, block: Block) -> torch.dtype:
        """The dtype in which a block travels: the narrower of the two, so that no bit is sent that is dropped, or was
        not there."""
        ours, theirs = self.dtypes[block.source], self.engine_dtypes[block.target]
        return ours if ours.itemsize < theirs.itemsize else theirs


@dataclass
class Plan:
    """Pieces to send and to take, bucket by bucket, the same buckets on every rank.

    A unit is a part of one parameter: the same rows of every shard of it. Units follow each other in the trainer's
    order, and buckets are runs of units, cut so that no rank sends or receives more than the limit in one, unless a
    single row is more.

    own, sends, takes: of `rank` alone, in order of unit; empty where the plan is of none. pieces: of all ranks.
    moved: [source][target] bytes that a rank's engine has from each rank; from itself they are copied.
    """

    layout: Layout
    rank: int | None
    buckets: list[Bucket] = field(default_factory=list)
    own: list[Piece] = field(default_factory=list)
    sends: list[Piece] = field(default_factory=list)
    takes: list[Piece] = field(default_factory=list)
    moved: list[list[int]] = field(default_factory=list)
    pieces: int = 0

    @property
    def sent(self) -> list[int]:
        """Bytes over the wire, by rank."""
        return [sum(row) - row[source] for source, row in enumerate(self.moved)]

    @property
    def received(self) -> list[int]:
        """Bytes over the wire, by rank."""
        columns = [list(column) for column in zip(*self.moved, strict=True)]
        return [sum(column) - column[target] for target, column in enumerate(columns)]

    @property
    def kept(self) -> list[int]:
        """Bytes that a rank's engine has from the rank itself."""
        return [row[rank] for rank, row in enumerate(self.moved)]

    @property
    def minimum(self) -> list[int]:
        """Bytes that every rank has to receive whoever sends them: its engine's, without those of rows that it has."""
        mesh, found = self.layout.mesh, []
        shard = {rank: i for row in mesh.ranks for i, rank in enumerate(row)}
        for rank, blocks in enumerate(self.layout.blocks):
            missing = 0
            for b in blocks:
                chunk = mesh.chunk(_rows(self.layout.shapes[b.source]))
                first, end = shard[rank] * chunk, (shard[rank] + 1) * chunk
                here = max(0, min(b.source_row + b.rows, end) - max(b.source_row, first))
                missing += (b.rows - here) * b.columns * self.layout.wire(b).itemsize
            found.append(missing)
        return found

    @property
    def gathered(self) -> int:
        """Bytes that every rank would receive if all gathered the whole model, as is usual."""
        wires = {b.source: self.layout.wire(b).itemsize for blocks in self.layout.blocks for b in blocks}
        whole = sum(_rows(s) * width(s) * wires[name] for name, s in self.layout.shapes.items())
        return whole - whole // self.layout.mesh.shards


def make_plan(layout: Layout, rank: int | None = None, *, bucket_bytes: int = BUCKET_BYTES) -> Plan:
    """The plan of a layout, with the pieces of `rank`. Of the same layout it is the same on all ranks."""
    units = _Units(layout, bucket_bytes)
    plan = Plan(layout, rank)
    size = layout.mesh.size
    plan.moved = [[0] * size for _ in range(size)]
    # What a rank sends and receives of a unit: [unit][rank].
    loads: dict[int, list[list[int]]] = {}
    for piece in _pieces(layout, units):
        plan.pieces += 1
        count = piece.block.rows * piece.block.columns * layout.wire(piece.block).itemsize
        plan.moved[piece.source][piece.target] += count
        if piece.source == piece.target:
            if piece.target == rank:
                plan.own.append(piece)
            continue
        load = loads.setdefault(piece.unit, [[0] * size, [0] * size])
        load[0][piece.source] += count
        load[1][piece.target] += count
        if piece.source == rank:
            plan.sends.append(piece)
        elif piece.target == rank:
            plan.takes.append(piece)
    plan.buckets = _buckets(units.dtypes, loads, size, bucket_bytes)
    for pieces in (plan.own, plan.sends, plan.takes):
        pieces.sort(key=_order)
    return plan


def all_pieces(layout: Layout, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Piece]:
    """Those of all ranks, as every rank's plan has its own of them."""
    return _pieces(layout, _Units(layout, bucket_bytes))


def _order(piece: Piece) -> tuple[int, ...]:
    """The same at both ends of a wire: a sender's pieces for one rank, and that rank's from the sender."""
    b = piece.block
    return (piece.unit, piece.target, piece.source, b.source_row, b.source_column, b.row, b.column)


class _Units:
    """Numbers for the units: of a parameter, the k-th of equal runs of rows of every shard."""

    def __init__(self, layout: Layout, bucket_bytes: int) -> None:
        wires: dict[str, torch.dtype] = {}
        for blocks in layout.blocks:
            for block in blocks:
                wires.setdefault(block.source, layout.wire(block))
        self.rows: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.dtypes: list[torch.dtype] = []
        for name, shape in layout.shapes.items():
            chunk = layout.mesh.chunk(_rows(shape))
            row_bytes = width(shape) * wires[name].itemsize
            # A rank may need the rows of all shards.
            self.rows[name] = max(1, min(chunk, bucket_bytes // max(1, row_bytes * layout.mesh.shards)))
            self.first[name] = len(self.dtypes)
            self.dtypes += [wires[name]] * -(-chunk // self.rows[name])


def _pieces(layout: Layout, units: _Units) -> Iterator[Piece]:
    """All blocks of all ranks, cut where another rank has the rows, or another unit begins."""
    mesh, replica_of = layout.mesh, layout.mesh.replica_of()
    for target, blocks in enumerate(layout.blocks):
        holders = replica_of[target]
        for b in blocks:
            chunk, run, first = mesh.chunk(_rows(layout.shapes[b.source])), units.rows[b.source], units.first[b.source]
            done = 0
            while done < b.rows:
                shard, within = divmod(b.source_row + done, chunk)
                unit = within // run
                rows = min(b.rows - done, chunk - within, (unit + 1) * run - within)
                part = Block(
                    b.target, b.row + done, b.column, b.source, b.source_row + done, b.source_column, rows, b.columns
                )
                yield Piece(holders[shard], target, first + unit, part)
                done += rows


def _buckets(
    dtypes: Sequence[torch.dtype], loads: Mapping[int, list[list[int]]], size: int, limit: int
) -> list[Bucket]:
    """Runs of all units."""
    buckets: list[Bucket] = []
    begin, full = 0, [0] * (2 * size)
    for unit, dtype in enumerate(dtypes):
        load = [count for side in loads.get(unit, []) for count in side] or [0] * (2 * size)
        after = [a + b for a, b in zip(full, load, strict=True)]
        if unit > begin and (max(after) > limit or dtype != dtypes[begin]):
            buckets.append(Bucket(begin, unit, dtypes[begin], not any(full)))
            begin, after = unit, load
        full = after
    if dtypes:
        buckets.append(Bucket(begin, len(dtypes), dtypes[begin], not any(full)))
    return buckets


def _rows(shape: Shape) -> int:
    return shape[0] if shape else 1


def mesh_of(parameter: Tensor, name: str) -> Mesh:
    """The mesh that a parameter is sharded over. Raises RuntimeError for one that is not cut by rows."""
    if not isinstance(parameter, DTensor):
        raise RuntimeError(f"the trainer's {name} is not sharded: a plain parameter of several ranks has no owner")
    placements = parameter.placements
    if placements[-1] != Shard(0) or any(p != Replicate() for p in placements[:-1]) or len(placements) > 2:
        raise RuntimeError(f"the trainer's {name} is placed as {placements}: only shards of its rows can be moved")
    return Mesh.of(parameter.device_mesh)
