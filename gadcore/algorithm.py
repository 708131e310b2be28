"""Generative Adversarial Distillation, beside Algorithm 1 of the paper (arXiv 2511.10643).

    Stage 1, warmup.  For each batch (x, y_t):
        G: cross-entropy on y_t.            D: Bradley-Terry, y_t against samples of the current G.
    Stage 2, GAD.     For each batch (x, y_t):
        y_s^1..y_s^N ~ G(. | x);  r_i = D(x, y_s^i);  G: GRPO on r;  D: Bradley-Terry on the same samples.

What differs from the paper's code, with the same mathematics: D looks at each response once per step (the reward of a
sample is its score inside the BT loss), the teacher is scored once per group, and no old log-probs are computed
because a batch gets one optimizer step.

Baselines and ablations are settings of the same stages (config.AlgorithmSettings); the defaults are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from gadcore.config.settings import Config
from gadcore.data.groups import Group
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.student import PolicyStats, SeqKDStats, Student
from gadcore.train.trainer import Trainer


class Run(Protocol):
    """What a stage asks of a run besides mathematics; gadcore.train.trainer.Trainer is one."""

    config: Config
    student: Student

    @property
    def discriminator(self) -> Discriminator: ...

    def phases(self, name: str) -> AbstractContextManager[None]:
        """Marks what the time inside the block is spent on, and lets the device hold what it needs."""

    def steps(self, stage: str) -> Iterator[tuple[int, list[Group]]]:
        """(step within the stage, from 1; its batch), for as long as the stage lasts.

        The gate can make the warmup longer, the convergence rule can make the GAD stage shorter.
        """

    def sample(self, groups: Sequence[Group], stage: str, step: int) -> None:
        """Draws N samples of the current student for every group, in the phases synchronise and rollout."""

    def record(
        self,
        stage: str,
        step: int,
        groups: Sequence[Group],
        stats: PolicyStats | SeqKDStats | None,
        student_norm: float | None,
        scores: Scores | None = None,
        discriminator_norm: float | None = None,
    ) -> None:
        """Ends a step, given what it found; None for a model that was not updated."""

    def ensure_reference(self) -> None:
        """Makes the student as it was when the GAD stage began the reference policy."""


def warmup(run: Run) -> None:
    """Stage 1: SeqKD for the student, Bradley-Terry for the discriminator.

    The first algorithm.critic_warmup steps update D only. Without D's warmup nothing is sampled.
    """
    student, algorithm, phase = run.student, run.config.algorithm, run.phases
    for step, groups in run.steps("warmup"):
        stats = student_norm = scores = discriminator_norm = None
        if algorithm.discriminator_warmup:
            run.sample(groups, "warmup", step)
            with phase("discriminator"):
                scores, discriminator_norm = score_and_update(run, groups, step)
        if algorithm.student_warmup and step > algorithm.critic_warmup:
            with phase("student"):
                stats = student.seqkd_backward(groups)
                student_norm = student.step(student.settings.warmup_lr)
        run.record("warmup", step, groups, stats, student_norm, scores, discriminator_norm)


def gad(run: Run) -> None:
    """Stage 2: the student learns by GRPO from the discriminator that learns beside it.

    The reference policy is the student as it is when this stage begins. A frozen D still gives the rewards.
    """
    student, phase = run.student, run.phases
    run.ensure_reference()
    for step, groups in run.steps("gad"):
        run.sample(groups, "gad", step)
        with phase("discriminator"):
            scores, discriminator_norm = score_and_update(
                run, groups, step, frozen=run.config.algorithm.freeze_discriminator
            )
        with phase("student"):
            stats = student.grpo_backward(groups, scores.rewards)
            student_norm = student.step(student.settings.lr)
        run.record("gad", step, groups, stats, student_norm, scores, discriminator_norm)


def score_and_update(
    run: Run, groups: Sequence[Group], step: int, *, frozen: bool = False
) -> tuple[Scores, float | None]:
    """(D's scores under the weights that it has before its updates, gradient norm of the first, None without one).

    The update may come at once, since the student reads nothing but the rewards: so D's gradient takes no memory while
    the student's is made. Further updates see the same samples again, under the new weights.
    """
    discriminator, algorithm = run.discriminator, run.config.algorithm
    if frozen or step % algorithm.discriminator_every:
        return discriminator.score(groups, backward=False), None
    scores = discriminator.score(groups, backward=True)
    norm = discriminator.step()
    for _ in range(algorithm.discriminator_steps - 1):
        again = discriminator.score(groups, backward=True)
        discriminator.step()
        scores = replace(scores, tokens=scores.tokens + again.tokens)
    return scores, norm


def seqkd(run: Run) -> None:
    """The baseline: cross-entropy on the teacher's text, nothing else."""
    student, phase = run.student, run.phases
    for step, groups in run.steps("seqkd"):
        with phase("student"):
            stats = student.seqkd_backward(groups)
            student_norm = student.step(student.settings.seqkd_lr)
        run.record("seqkd", step, groups, stats, student_norm)


STAGES = {"warmup": warmup, "gad": gad, "seqkd": seqkd}


def train(run: Trainer) -> dict[str, Any]:
    """All stages of the run in order, with the held-out evaluation before, between and after; returns the summary."""
    run.evaluate("before")
    for stage in run.stage_steps:
        if not run.is_done(stage):
            STAGES[stage](run)
            run.end_stage(stage)
        run.evaluate(f"after_{stage}")
    return run.finish()
