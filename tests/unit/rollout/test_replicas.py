"""Samplers beside each other: every request is drawn by one, and all have all responses in order."""

from __future__ import annotations

import pytest

from gadcore.distributed.world import World
from gadcore.rollout.engine import SampleRequest
from gadcore.rollout.replicas import Replicas


class Worlds(World):
    """A process's place, with what the others said."""

    said: list = []

    def all_gather_objects(self, value):
        assert self.said[self.rank] == value
        return self.said


@pytest.mark.parametrize(("size", "degree"), [(1, 1), (2, 1), (2, 2), (8, 2), (6, 3)])
@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_shares_and_responses(size: int, degree: int, count: int) -> None:
    requests = [SampleRequest((i,), 1, i) for i in range(count)]
    worlds = [Worlds(rank, size) for rank in range(size)]
    shares = [Replicas(world, degree).share(requests) for world in worlds]
    samplers = shares[::degree]
    assert sorted(r.seed for share in samplers for r in share) == list(range(count))
    assert all(shares[rank] == samplers[rank // degree] for rank in range(size)), "one sampler's ranks draw the same"
    assert max(map(len, samplers)) - min(map(len, samplers)) <= 1
    # A response says whose it is.
    drawn = [[[request.seed] for request in share] for share in shares]
    Worlds.said = [own if rank % degree == 0 else [] for rank, own in enumerate(drawn)]
    for rank, world in enumerate(worlds):
        assert Replicas(world, degree).gather(drawn[rank], count) == [[i] for i in range(count)]
