"""Held-out prompts: the evaluation of a run, and what the gate and the convergence rule measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from gadcore.config.settings import ConvergenceSettings
from gadcore.data.groups import Group
from gadcore.measure.fresh import FreshResult
from gadcore.measure.heldout import evaluate
from gadcore.memory.colocation import Colocation
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student
from gadcore.rollout.sampler import Sampler
from gadcore.train.convergence import measure
from gadcore.train.phases import Phases


class Heldout:
    """Draws samples of held-out prompts and measures them.

    The same seeds every time: differences come from the models alone. No time of it counts in a step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        sampler: Sampler,
        discriminator: Discriminator | None,
        phases: Phases,
        memory: Colocation,
        make_discriminator: Callable[[], Discriminator] | None = None,
        *,
        samples: int = 1,
    ) -> None:
        """make_discriminator: an untrained discriminator for the convergence rule, equal ones on every call. samples:
        of a prompt in an evaluation; the gate and the convergence rule draw one."""
        self.groups, self._samples_each = groups, samples
        self._sampler, self._discriminator, self._phases, self._memory = sampler, discriminator, phases, memory
        self._make_discriminator = make_discriminator
        self._latest: list[Group] = []

    def evaluate(self, *, scored: bool = True, moved: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(figures of the student, and of D where there is one, as they are now; a row per prompt).

        scored: False leaves D out. moved: False, the student is as it was at the evaluation before: so are its samples,
        and none are drawn where this process has drawn them.
        """
        discriminator = self._discriminator if scored else None
        with self._phases("evaluation"):
            if moved or not self._latest:
                self._latest = self._samples(n=self._samples_each)
            with self._phases("discriminator") if discriminator else nullcontext():
                found = evaluate(self._latest, discriminator)
        self._phases.take_step()
        return found

    def accuracy(self, rows: int) -> float:
        """D's accuracy on pairs of the first held-out prompts."""
        if self._discriminator is None:
            raise RuntimeError("this run has no discriminator")
        with self._phases("evaluation"):
            groups = self._samples(rows)
            with self._phases("discriminator"):
                scores = self._discriminator.score(groups, backward=False)
        self._phases.take_step()
        return scores.accuracy

    def cross_entropy(self, student: Student, rows: int) -> float:
        """The student's on the teacher's responses to the first held-out prompts."""
        with self._phases("evaluation"), self._phases("student"):
            value = student.cross_entropy(self.groups[:rows])
        self._phases.take_step()
        return value

    def fresh(self, settings: ConvergenceSettings, seed: int) -> FreshResult:
        """What a fresh discriminator, trained on some of the pairs, tells of the others."""
        if self._make_discriminator is None:
            raise RuntimeError("the convergence rule needs make_discriminator")
        with self._phases("evaluation"):
            groups = self._samples(settings.rows)
            # The fresh discriminator gets the device for itself.
            self._memory.enter("rest")
            return measure(groups, self._make_discriminator, settings, seed)

    def _samples(self, rows: int | None = None, n: int = 1) -> list[Group]:
        groups = [Group(g.prompt, g.teacher) for g in self.groups[:rows]]
        self._sampler.draw(groups, n, "evaluation")
        return groups
