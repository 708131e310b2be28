"""Generative Adversarial Distillation, beside Algorithm 1 of the paper (arXiv 2511.10643).

    Stage 0, sft, none in the paper: cross-entropy on y_t alone.
    Stage 1, warmup.  For each batch (x, y_t):
        G: cross-entropy on y_t.            D: Bradley-Terry, y_t against samples of the current G.
    Stage 2, GAD.     For each batch (x, y_t):
        y_s^1..y_s^N ~ G(. | x);  r_i = D(x, y_s^i);  G: GRPO on r;  D: Bradley-Terry on the same samples.

What differs from the paper's code, with the same mathematics: D looks at each response once per step (the reward of a
sample is its score inside the BT loss), the teacher is scored once per group, and no old log-probs are computed
because a batch gets one optimizer step.

Who holds the device: run.sample() brings the student's parameters and the engine's weights (phase "synchronise"), then
the engine's key-value cache (phase "rollout"); phases "discriminator" and "student" bring that model's parameters,
phases "discriminator_update" and "student_update" its optimizer beside them, phase "reference" the reference policy
alone; what a phase does not need waits in the host's memory meanwhile, where memory.offload says so
(gadcore/memory/holdings.py).

Baselines and ablations are settings of the same stages (AlgorithmSettings); the defaults are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from gadcore.config.settings import Config
from gadcore.data.groups import Group
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.preference import preference_backward
from gadcore.models.student import Student
from gadcore.train.snapshot import Snapshot
from gadcore.train.step import StepResult
from gadcore.train.trainer import Trainer


class Run(Protocol):
    """What a stage asks of a run besides mathematics; gadcore.train.trainer.Trainer is one."""

    config: Config
    student: Student

    @property
    def discriminator(self) -> Discriminator: ...

    def phases(self, name: str) -> AbstractContextManager[None]:
        """Marks what the time inside the block is spent on, and lets the device hold what it needs."""

    def begin(self, stage: str) -> None:
        """The stage begins, or goes on where a resumed run stands."""

    def steps(self, stage: str) -> Iterator[tuple[int, list[Group]]]:
        """(step within the stage, from 1; its batch), until its length, or until the convergence rule ends it."""

    def sample(self, groups: Sequence[Group], stage: str, step: int) -> None:
        """Draws N samples of the current student for every group, in the phases synchronise and rollout."""

    def sampled(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """The batch in parts, each as soon as it has its samples; one part, unless rollout.parts says otherwise."""

    def rewards(self, groups: Sequence[Group], scores: Scores) -> list[list[float]] | None:
        """What algorithm.score_clip, .length_debias and .reward make of D's scores; None: they are the rewards."""

    def record(self, result: StepResult) -> None:
        """Ends a step: figures, a checkpoint when due, a measurement of the convergence rule when due."""

    def gate_opens(self) -> bool:
        """Measures D at the gate, where there is one. False: the warmup has become longer."""

    def ensure_reference(self) -> None:
        """Makes the student as it was when the GAD stage began the reference policy."""

    def measure_before_gad(self) -> None:
        """The convergence rule's first measurement, where it is in use."""

    def take_snapshot(self) -> Snapshot:
        """Samples of every row by the student as it is when the stage soda begins, and its log-probs of them."""

    def restore_best(self) -> None:
        """Gives both models the weights that they had at the convergence rule's minimum, where it is in use."""


def warmup(run: Run) -> None:
    """Stage 1: SeqKD for the student, Bradley-Terry for the discriminator.

    The first algorithm.critic_warmup steps update D only. Without D's warmup nothing is sampled. The gate, where it is
    in use, lets the stage end only where D's held-out accuracy is of use to the student.
    """
    student, algorithm, phase = run.student, run.config.algorithm, run.phases
    run.begin("warmup")
    while True:
        for step, groups in run.steps("warmup"):
            result = StepResult("warmup", step, groups)
            if algorithm.discriminator_warmup:
                run.sample(groups, "warmup", step)
                result.scores, result.discriminator_norm = score_and_update(run, groups, step)
            if algorithm.student_warmup and step > algorithm.critic_warmup:
                with phase("student"):
                    result.stats = student.seqkd_backward(groups)
                with phase("student_update"):
                    result.student_norm = student.step(student.settings.warmup_lr)
            run.record(result)
        if run.gate_opens():
            return


def gad(run: Run) -> None:
    """Stage 2: the student learns by GRPO from the discriminator that learns beside it.

    The reference policy is the student as it is when this stage begins. A frozen D still gives the rewards. Where the
    convergence rule is in use, the result is the student of its minimum.
    """
    student, frozen, phase = run.student, run.config.algorithm.freeze_discriminator, run.phases
    run.begin("gad")
    run.ensure_reference()
    run.measure_before_gad()
    for step, groups in run.steps("gad"):
        result = StepResult("gad", step, groups)
        run.sample(groups, "gad", step)
        result.scores, result.discriminator_norm = score_and_update(run, groups, step, frozen=frozen)
        result.rewards = run.rewards(groups, result.scores)
        reference = reference_logprobs(run, groups)
        with phase("student"):
            result.stats = student.grpo_backward(groups, result.for_grpo(), reference)
        with phase("student_update"):
            result.student_norm = student.step(student.settings.lr)
        run.record(result)
    run.restore_best()


def score_and_update(
    run: Run, groups: Sequence[Group], step: int, *, frozen: bool = False
) -> tuple[Scores, float | None]:
    """(D's scores under the weights that it has before its updates, gradient norm of the first, None without one),
    in the phases discriminator and discriminator_update.

    The update may come at once, since the student reads nothing but the rewards: so D's gradient takes no memory while
    the student's is made. Further updates see the same samples again, under the new weights.
    """
    discriminator, algorithm, phase = run.discriminator, run.config.algorithm, run.phases
    updates = not frozen and step % algorithm.discriminator_every == 0
    scoring = discriminator.scoring(len(groups) * run.config.rollout.group_size, backward=updates)
    for part in run.sampled(groups):
        with phase("discriminator"):
            scoring.add(part)
    scores = scoring.scores()
    if not updates:
        return scores, None
    with phase("discriminator_update"):
        norm = discriminator.step()
    for _ in range(algorithm.discriminator_steps - 1):
        with phase("discriminator"):
            scores.tokens += discriminator.score(groups, backward=True).tokens
        with phase("discriminator_update"):
            discriminator.step()
    return scores, norm


def reference_logprobs(run: Run, groups: Sequence[Group]) -> Tensor | None:
    """Log-probs of the samples under the reference policy, in the phase reference; None where there is none."""
    if run.student.reference is None:
        return None
    with run.phases("reference"):
        return run.student.reference_logprobs(groups)


def seqkd(run: Run) -> None:
    """The baseline: cross-entropy on the teacher's text, nothing else."""
    _cross_entropy(run, "seqkd", run.student.settings.seqkd_lr)


def sft(run: Run) -> None:
    """Before stage 1, where it is asked for: the student's cross-entropy alone, so that D meets a student that has
    learned from the teacher's text what can be learned from it so."""
    _cross_entropy(run, "sft", run.student.settings.warmup_lr)


def _cross_entropy(run: Run, stage: str, lr: float) -> None:
    student, phase = run.student, run.phases
    run.begin(stage)
    for step, groups in run.steps(stage):
        result = StepResult(stage, step, groups)
        with phase("student"):
            result.stats = student.seqkd_backward(groups)
        with phase("student_update"):
            result.student_norm = student.step(lr)
        run.record(result)


def soda(run: Run) -> None:
    """The baseline of arXiv 2604.03873: DPO of the teacher's responses against samples of one frozen snapshot, the
    student as it is when this stage begins, which is the reference policy too. Nothing is sampled after that."""
    student, phase = run.student, run.phases
    run.begin("soda")
    snapshot = run.take_snapshot()
    for step, groups in run.steps("soda"):
        result = StepResult("soda", step, groups)
        reference = snapshot.of(groups)
        with phase("student"):
            result.stats = preference_backward(student, groups, reference, run.config.algorithm.soda_beta)
        with phase("student_update"):
            result.student_norm = student.step(student.settings.soda_lr)
        run.record(result)


STAGES = {"sft": sft, "warmup": warmup, "gad": gad, "seqkd": seqkd, "soda": soda}


def train(run: Trainer) -> dict[str, Any]:
    """All stages of the run in order, with the held-out evaluation before, between and after; returns the summary."""
    run.evaluate("before")
    for stage in run.stage_steps:
        if not run.is_done(stage):
            STAGES[stage](run)
            run.end_stage(stage)
        run.evaluate(f"after_{stage}")
    return run.finish()
