"""Gradients that every process has whole: one order of additions, the same bits on all."""

from __future__ import annotations

import pytest
import torch

from gadcore.distributed.gradients import add_up
from gadcore.distributed.world import ALONE, World
from tests.support.ranks import run_ranks

# Several processes: some seconds to start them.
pytestmark = pytest.mark.slow

HERE = "tests.unit.distributed.test_gradients"
# Entries that three do not divide, fewer than three, none at all, a matrix that is a view of columns.
SHAPES = [(7, 5), (1,), (), (0, 4), (64, 33), (2,), (4, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
RANKS = 3


def of_rank(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    made = []
    for dtype in DTYPES:
        made += [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        made.append(torch.randn((6, 9), generator=generator).to(dtype)[:, ::2])
    return made


def added(world: World) -> dict:
    found = {}
    for size in (1, 300, 1 << 25):
        own = of_rank(world.rank)
        add_up(own, world, bucket_bytes=size)
        found[size] = own
    return found


def in_order(rank_after_rank: list[torch.Tensor]) -> torch.Tensor:
    first, *others = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in rank_after_rank)
    for other in others:
        first = first + other
    return first.to(rank_after_rank[0].dtype)


def test_every_process_has_the_sum_in_the_order_of_the_ranks() -> None:
    expected = [in_order(list(each)) for each in zip(*map(of_rank, range(RANKS)), strict=True)]
    backwards = [in_order(list(each)[::-1]) for each in zip(*map(of_rank, range(RANKS)), strict=True)]
    assert not all(map(torch.equal, expected, backwards)), "any order gives these sums"
    for found in run_ranks(RANKS, f"{HERE}:added", deadline=300):
        # Whatever is sent at a time.
        for size, sums in found.items():
            assert all(map(torch.equal, sums, expected)), size


def test_alone_nothing_is_added() -> None:
    own = of_rank(0)
    add_up(own, ALONE)
    assert all(map(torch.equal, own, of_rank(0)))
