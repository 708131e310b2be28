"""The processes of a job: one alone, or all that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gadcore.errors import UserError, cause

T = TypeVar("T")
# Names of the mesh's dimensions: parameters are cut along the one, and whole copies of the shards lie along the other.
SHARD, REPLICATE = "shard", "replicate"


@dataclass(frozen=True)
class World:
    """Who computes together. Every process of it calls the same collectives in the same order.

    rank, size: of this process, among all. local_rank: among those of its node. nodes: how many there are.
    mesh: how models are sharded over the processes, ("shard",) or ("replicate", "shard"); None for one process alone,
    where every collective below does nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int = 1
    mesh: DeviceMesh | None = None

    @staticmethod
    def alone() -> World:
        """One process without others."""
        return ALONE

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Processes that a parameter is cut over."""
        return 1 if self.mesh is None else self.mesh[SHARD].size()

    @property
    def shard(self) -> int:
        """Which of the shards this process has."""
        return 0 if self.mesh is None else self.mesh[SHARD].get_local_rank()

    @property
    def replica(self) -> int:
        """Which of the whole copies its shard is part of."""
        return 0 if self.mesh is None or self.mesh.ndim == 1 else self.mesh[REPLICATE].get_local_rank()

    @property
    def neighbours(self) -> int:
        """Processes of this node, which share its memory."""
        return self.size // self.nodes

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of what is done once: every item is exactly one process's."""
        return items[self.rank :: self.size]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over all processes, in place; on all the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The greatest of every entry over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[size, ..]: the tensor of every process, by rank; all are of one shape."""
        found = tensor.new_empty(self.size, *tensor.shape)
        if self.size > 1:
            dist.all_gather_single(found.view(-1), tensor.contiguous().view(-1))
        else:
            found[0] = tensor
        return found

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """[size, ..]: what every process has for this one, by rank. tensor: [size, ..], what this one has for each."""
        found = torch.empty_like(tensor)
        if self.size > 1:
            dist.all_to_all_single(found.view(-1), tensor.view(-1))
        else:
            found.copy_(tensor)
        return found

    def all_gather_objects(self, value: T) -> list[T]:
        """The value of every process, by rank. For what is small: it is pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast_object(self, value: T) -> T:
        """The value of the first process, on all."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Waits until all processes have come this far."""
        if self.size > 1:
            dist.barrier()

    def agree(self, error: BaseException | None) -> None:
        """Raises on all processes where one of them has an error: its own there, on the others the first one's text.

        Of a UserError it is a UserError. Without an error anywhere it returns.
        """
        # Texts are exchanged only where there is one.
        if not int(self.max_(torch.tensor(int(error is not None)))):
            return
        by_user = isinstance(error, UserError)
        told = None if error is None else (by_user, str(error) if by_user else cause(error))
        found = self.all_gather_objects(told)
        if error is not None:
            raise error
        for rank, other in enumerate(found):
            if other is not None:
                by_user, text = other
                if by_user:
                    raise UserError(text)
                raise RuntimeError(f"rank {rank} failed: {text}")

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What ends the block with an error on one process ends it so on all; see agree().

        Inside there must be no collective: a process that has failed does not come to it, and the others would wait.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        if self.size > 1:
            self.agree(error)


ALONE = World()


@contextmanager
def join_world(device: torch.device, *, timeout_s: float = 600.0, replicas: int = 1) -> Iterator[World]:
    """Joins the job that torchrun has started this process for, and leaves it at the end; alone without torchrun.

    device: of type "cpu" (gloo) or "cuda" (NCCL, and gloo for what is on the host); the process's GPU becomes the
    current one. timeout_s: a collective that waits longer for another process fails. replicas: whole copies of every
    model, 1 or as many as there are nodes (HSDP): shards are then exchanged inside a node, sums of gradients between.

    Raises UserError where `replicas` does not divide the processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if replicas < 1 or size % replicas:
        raise UserError(
            f"{size} processes cannot hold {replicas} copies of a model: the copies must divide the processes, take 1 "
            "or the number of nodes"
        )
    local_rank, per_node = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # A restarted job would find the addresses of the processes before it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"gadcore/{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    shape, names = ((size,), (SHARD,)) if replicas == 1 else ((replicas, size // replicas), (REPLICATE, SHARD))
    try:
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        for name in names:
            # A mesh makes groups of its own, which would wait for half an hour.
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))
        yield World(rank, size, local_rank, size // per_node, mesh)
    finally:
        dist.destroy_process_group()
