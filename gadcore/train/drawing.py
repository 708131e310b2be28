"""When the samples of a step are drawn, and in which parts the discriminator gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gadcore.data.groups import Group
from gadcore.rollout.engine import Pending, WeightsLost
from gadcore.rollout.sampler import Sampler


class Drawing:
    """Draws the samples of a step as it begins, all of them.

    meanwhile: whether the sampler works beside the trainer, so that the rollout's seconds are those that were waited.
    """

    meanwhile = False

    def __init__(self, sampler: Sampler, samples: int) -> None:
        """samples: of a prompt."""
        self._sampler, self._samples = sampler, samples

    def draw(self, groups: Sequence[Group], stage: str, step: int, *, last: bool) -> None:
        """Gives every group of a step its samples, or begins on them. last: of its stage."""
        self._sampler.draw(groups, self._samples, f"{stage}/{step}")

    def parts(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """The groups of the step that draw() was called for, in parts, each as it has its samples."""
        yield groups

    def figures(self) -> dict[str, float]:
        """What metrics.jsonl says of the samples of the step."""
        return {}

    def drop(self) -> None:
        """Forgets what is drawn for a step that will not come."""

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a checkpoint keeps of samples for the next step, tensors and JSON; None where there are none."""
        return None

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Goes on with what saved() gave."""


class InParts(Drawing):
    """rollout.parts: the discriminator begins with the first part of a batch while the others are drawn.

    Parts are cut and scored in the batch's order, whatever is ready first: so a run has one order in which sums are
    added, and goes on to the bit.
    """

    meanwhile = True

    def __init__(self, sampler: Sampler, samples: int, parts: int, say: Callable[[str], None]) -> None:
        """say: is told where samples are drawn anew."""
        super().__init__(sampler, samples)
        self._parts, self._say = parts, say
        self._purpose = ""
        self._pending: Pending | None = None

    def draw(self, groups: Sequence[Group], stage: str, step: int, *, last: bool) -> None:
        self._purpose = f"{stage}/{step}"
        self._pending = self._sampler.begin(groups, self._samples, self._purpose)

    def parts(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        assert self._pending is not None
        size = -(-len(groups) // self._parts)
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            places = range(start, start + len(part))
            try:
                responses = self._sampler.awaited(self._pending, places)
            except WeightsLost as error:
                self._say(f"{error}: the rest of its batch is drawn again")
                # The same weights and seeds: what was scored already stays what it is.
                self._pending = self._sampler.begin(groups, self._samples, self._purpose)
                responses = self._sampler.awaited(self._pending, places)
            self._sampler.give(part, responses)
            yield part
