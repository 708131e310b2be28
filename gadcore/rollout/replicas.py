"""Samplers beside each other: who draws which requests, and everybody has all responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gadcore.data.groups import Response
from gadcore.distributed.world import World
from gadcore.rollout.engine import Done, SampleRequest

Draw = Callable[[Sequence[SampleRequest], Done | None], list[list[Response]]]


class Replicas:
    """The samplers of a world: `degree` ranks that follow each other are one.

    A request's seed decides its samples, so that it is the same who draws it.
    """

    def __init__(self, world: World, degree: int) -> None:
        self._world, self._degree = world, degree
        self._count, self._own = world.size // degree, world.rank // degree

    def share(self, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
        """Those that this rank's sampler draws, the same on all its ranks."""
        return list(requests[self._own :: self._count])

    def draw(self, requests: Sequence[SampleRequest], draw: Draw, done: Done | None) -> list[list[Response]]:
        """The responses to all requests, each drawn by one sampler. draw: of this rank's share. done: see
        Engine.generate(); of others' requests nothing is known before all are gathered."""
        mine = self.share(requests)
        told = done if len(mine) == len(requests) else None
        responses = self.gather(draw(mine, told), len(requests))
        if done is not None and told is None:
            for place, found in enumerate(responses):
                done(place, found)
        return responses

    def gather(self, drawn: list[list[Response]], count: int) -> list[list[Response]]:
        """The responses to all `count` requests in their order. drawn: those of this rank's share."""
        if self._count == 1:
            return drawn
        leads = self._world.rank % self._degree == 0
        found = self._world.all_gather_objects(drawn if leads else [])[:: self._degree]
        return [found[i % self._count][i // self._count] for i in range(count)]
