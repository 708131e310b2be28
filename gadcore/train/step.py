"""What one step found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gadcore.data.groups import Group
from gadcore.models.discriminator import Scores
from gadcore.models.preference import PreferenceStats
from gadcore.models.student import PolicyStats, Rewards, SeqKDStats


@dataclass
class StepResult:
    """Of a step of a stage, counted from 1; None for what a stage or an ablation leaves out.

    groups: the batch, with its samples. student_norm, discriminator_norm: of gradients before clipping; None for a
    model that was not updated. scores: D's, from before its update. rewards: what GRPO got, where algorithm.reward made
    it; else it got the scores.
    """

    stage: str
    step: int
    groups: Sequence[Group]
    stats: PolicyStats | SeqKDStats | PreferenceStats | None = None
    student_norm: float | None = None
    scores: Scores | None = None
    discriminator_norm: float | None = None
    rewards: list[list[float]] | None = None

    def for_grpo(self) -> Rewards:
        """The rewards that the student learns from."""
        if self.rewards is not None:
            return self.rewards
        if self.scores is None:
            raise RuntimeError(f"step {self.step} of {self.stage} has no scores")
        return self.scores.sample_scores

    def rewards_by_group(self) -> list[list[float]]:
        """The same as numbers, for records."""
        if self.rewards is not None:
            return self.rewards
        return [] if self.scores is None else self.scores.rewards

    def triplet(self, step: int) -> dict[str, Any]:
        """What samples.jsonl tells of the first group: the prompt, the teacher's response and the best sample. step: of
        the run. ValueError for a step that scored nothing."""
        if self.scores is None:
            raise ValueError(f"step {self.step} of {self.stage} has no scores")
        group, rewards = self.groups[0], self.rewards_by_group()[0]
        best = max(range(len(group.samples)), key=lambda i: rewards[i])
        return {
            "stage": self.stage,
            "step": step,
            "prompt": group.prompt.messages[-1]["content"],
            "teacher": group.teacher.text,
            "student": group.samples[best].text,
            "reward": rewards[best],
            "teacher_score": self.scores.teacher_scores[0],
        }
