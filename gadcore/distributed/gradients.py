"""Gradients of a model that every process has whole: added up over all of them, in one order.

Every process adds up its share of the entries, rank after rank, and sends the sums to the others. Those are as many
bytes as an all-reduce takes, whose order is that of an algorithm which its library chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gadcore.distributed.world import World

# What is on its way at once: three times as much memory is taken for it.
BUCKET_BYTES = 32 << 20


def add_up(gradients: Sequence[Tensor], world: World, *, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Makes each ((g_0 + g_1) + g_2) + .. of the processes' own, in place: on all of them the same bits.

    In float32, or in the gradients' dtype where that is wider. Every process calls it with tensors of the same shapes
    and dtypes, on one device.
    """
    if world.size == 1:
        return
    for bucket in _buckets(gradients, bucket_bytes):
        _add_up(bucket, world)


def _buckets(gradients: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Those that follow each other and are added up in one dtype, so that a bucket has about as many bytes at most."""
    bucket: list[Tensor] = []
    taken = 0
    for gradient in gradients:
        dtype = _dtype(gradient)
        size = gradient.numel() * dtype.itemsize
        if bucket and (_dtype(bucket[0]) != dtype or taken + size > bucket_bytes):
            yield bucket
            bucket, taken = [], 0
        bucket.append(gradient)
        taken += size
    if bucket:
        yield bucket


def _dtype(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


@torch.no_grad()
def _add_up(bucket: list[Tensor], world: World) -> None:
    sizes = [gradient.numel() for gradient in bucket]
    count = sum(sizes)
    share = -(-count // world.size)
    # The last share may be shorter: zeros behind it.
    own = torch.zeros(world.size * share, dtype=_dtype(bucket[0]), device=bucket[0].device)
    for place, gradient in zip(own[:count].split(sizes), bucket, strict=True):
        place.copy_(gradient.reshape(-1))
    total, *others = world.all_to_all(own.view(world.size, share))
    for other in others:
        total += other
    sums = world.all_gather(total).view(-1)
    for gradient, found in zip(bucket, sums[:count].split(sizes), strict=True):
        gradient.copy_(found.view_as(gradient))
