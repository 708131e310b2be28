"""Carries out a plan of gadcore.distributed.reshard: casts on the way, straight into the engine's storage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gadcore.distributed.reshard import Bucket, Piece, Plan
from gadcore.distributed.reshard_blocks import matrix
from gadcore.kernels.cast_copy import cast_copy


@dataclass(frozen=True)
class Moved:
    """What a push took on this rank: bytes over the wire, collectives, most bytes in buffers at a time."""

    sent: int
    received: int
    calls: int
    buffers: int


@dataclass(frozen=True)
class _Transfer:
    """A bucket on this rank: pieces in their order on the wire, and entries for, and from, every rank."""

    bucket: Bucket
    own: Sequence[Piece]
    sends: Sequence[Piece]
    takes: Sequence[Piece]
    out: list[int]
    into: list[int]


@dataclass
class _Flight:
    """A bucket that is under way."""

    transfer: _Transfer
    sent: Tensor
    received: Tensor
    work: Any


class Exchange:
    """Pushes the trainer's shards into an engine's parameters, as often as it is asked to.

    All ranks of the default process group push together.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor]) -> None:
        """plan: with the pieces of this process's rank. parameters: the engine's; their storage is written to."""
        if plan.rank is None:
            raise ValueError("the plan is of no rank")
        self.plan = plan
        self._parameters = parameters
        mesh = plan.layout.mesh
        (self._shard,) = (row.index(plan.rank) for row in mesh.ranks if plan.rank in row)
        self._transfers = [self._transfer(bucket) for bucket in plan.buckets]

    def _transfer(self, bucket: Bucket) -> _Transfer:
        own, sends, takes = (
            pieces[bisect_left(pieces, bucket.begin, key=_unit) : bisect_left(pieces, bucket.end, key=_unit)]
            for pieces in (self.plan.own, self.plan.sends, self.plan.takes)
        )
        # Stable: pieces of one pair of ranks stay in the order that both ends have.
        sends, takes = sorted(sends, key=lambda p: p.target), sorted(takes, key=lambda p: p.source)
        out, into = [0] * self.plan.layout.mesh.size, [0] * self.plan.layout.mesh.size
        for piece in sends:
            out[piece.target] += _entries(piece)
        for piece in takes:
            into[piece.source] += _entries(piece)
        return _Transfer(bucket, own, sends, takes, out, into)

    @torch.no_grad()
    def push(self, weights: Iterable[tuple[str, Tensor]]) -> Moved:
        """Every parameter of the engine holds the trainer's values from here on, cast to its dtype.

        weights: the trainer's sharded parameters. While one bucket is on the wire the next one is packed, and what this
        rank has itself is copied.
        """
        local = {name: _local(tensor) for name, tensor in weights}
        if unknown := sorted(local.keys() ^ self.plan.layout.shapes.keys()):
            raise RuntimeError(f"the plan was made for other parameters than these: {unknown[0]}")
        sent = received = calls = buffers = 0
        flying: _Flight | None = None
        for transfer in self._transfers:
            begun = None if transfer.bucket.idle else self._begin(transfer, local)
            cast_copy([(self._rows(piece, local), self._place(piece)) for piece in transfer.own])
            if begun is not None:
                sent, received, calls = sent + begun.sent.nbytes, received + begun.received.nbytes, calls + 1
                held = [flight for flight in (flying, begun) if flight is not None]
                buffers = max(buffers, sum(flight.sent.nbytes + flight.received.nbytes for flight in held))
                if flying is not None:
                    self._finish(flying)
                flying = begun
        if flying is not None:
            self._finish(flying)
        return Moved(sent, received, calls, buffers)

    def _begin(self, transfer: _Transfer, local: Mapping[str, Tensor]) -> _Flight:
        """Packs a bucket and sends it off."""
        device, dtype = next(iter(local.values())).device, transfer.bucket.dtype
        sent = torch.empty(sum(transfer.out), dtype=dtype, device=device)
        received = torch.empty(sum(transfer.into), dtype=dtype, device=device)
        packed = zip(transfer.sends, _cut(sent, transfer.sends), strict=True)
        cast_copy([(self._rows(piece, local), place) for piece, place in packed])
        work = dist.all_to_all_single(received, sent, transfer.into, transfer.out, async_op=True)
        return _Flight(transfer, sent, received, work)

    def _finish(self, flight: _Flight) -> None:
        """Waits for a bucket and puts it where it belongs."""
        flight.work.wait()
        takes = flight.transfer.takes
        unpacked = zip(takes, _cut(flight.received, takes), strict=True)
        cast_copy([(part, self._place(piece)) for piece, part in unpacked])

    def _rows(self, piece: Piece, local: Mapping[str, Tensor]) -> Tensor:
        """The piece in this rank's shard."""
        b, shape = piece.block, self.plan.layout.shapes[piece.block.source]
        row = b.source_row - self._shard * self.plan.layout.mesh.chunk(shape[0] if shape else 1)
        whole = matrix(local[b.source])
        return whole[row : row + b.rows, b.source_column : b.source_column + b.columns]

    def _place(self, piece: Piece) -> Tensor:
        """The piece in this rank's engine."""
        b = piece.block
        return matrix(self._parameters[b.target].detach())[b.row : b.row + b.rows, b.column : b.column + b.columns]


def _unit(piece: Piece) -> int:
    return piece.unit


def _entries(piece: Piece) -> int:
    return piece.block.rows * piece.block.columns


def _cut(buffer: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Every piece's part of a buffer in which they follow each other."""
    parts = buffer.split([_entries(piece) for piece in pieces]) if pieces else ()
    return [part.view(p.block.rows, p.block.columns) for part, p in zip(parts, pieces, strict=True)]


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
