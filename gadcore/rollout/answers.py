"""A sampler whose samples show of their reasoning what data.reasoning lets others see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gadcore.data.groups import Group, Response
from gadcore.data.reasoning import Policy, of_samples
from gadcore.rollout.sampler import Sampler


class AnswerSampler(Sampler):
    """A Sampler: the text of what it gives is what the policy leaves of it, the tokens are as they were drawn."""

    def __init__(self, *arguments: Any, reasoning: Policy, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.reasoning: Policy = reasoning

    def give(self, groups: Sequence[Group], responses: Sequence[list[Response]]) -> None:
        """As of Sampler. Raises UserError for a sample that the policy refuses."""
        super().give(groups, responses)
        of_samples(groups, self.reasoning)
