"""Generative Adversarial Distillation, beside Algorithm 1 of the paper (arXiv 2511.10643).

    Stage 1, warmup.  For each batch (x, y_t):
        G: cross-entropy on y_t.            D: Bradley-Terry, y_t against samples of the current G.
    Stage 2, GAD.     For each batch (x, y_t):
        y_s^1..y_s^N ~ G(. | x);  r_i = D(x, y_s^i);  G: GRPO on r;  D: Bradley-Terry on the same samples.

What differs from the paper's code, with the same mathematics: D looks at each response once per step (the reward of a
sample is its score inside the BT loss), the teacher is scored once per group, and no old log-probs are computed
because a batch gets one optimizer step.
"""

from __future__ import annotations

from gadcore.trainer import Trainer


def warmup(trainer: Trainer) -> None:
    """Stage 1: SeqKD for the student, Bradley-Terry for the discriminator.

    The first algorithm.critic_warmup steps update D only.
    """
    student, discriminator, phase = trainer.student, trainer.discriminator, trainer.phases
    for step, groups in trainer.steps("warmup"):
        with phase("rollout"):
            trainer.sample(groups, "warmup", step)
        with phase("discriminator"):
            judgement = discriminator.judge(groups, backward=True)
            discriminator_norm = discriminator.step()
        stats = student_norm = None
        if step > trainer.config.algorithm.critic_warmup:
            with phase("student"):
                stats = student.seqkd_backward(groups)
                student_norm = student.step(student.settings.warmup_lr)
        trainer.record("warmup", step, groups, stats, student_norm, judgement, discriminator_norm)


def gad(trainer: Trainer) -> None:
    """Stage 2: the student learns by GRPO from the discriminator that learns beside it.

    The reference policy is the student as it is when this stage begins.
    """
    student, discriminator, phase = trainer.student, trainer.discriminator, trainer.phases
    trainer.ensure_reference()
    for step, groups in trainer.steps("gad"):
        with phase("rollout"):
            trainer.sample(groups, "gad", step)
        with phase("discriminator"):
            # Rewards under the weights that D has before this step's update. The update may come at once, since the
            # student reads nothing but the rewards: so D's gradient takes no memory while the student's is made.
            judgement = discriminator.judge(groups, backward=True)
            discriminator_norm = discriminator.step()
        with phase("student"):
            stats = student.grpo_backward(groups, judgement.rewards)
            student_norm = student.step(student.settings.lr)
        trainer.record("gad", step, groups, stats, student_norm, judgement, discriminator_norm)


def seqkd(trainer: Trainer) -> None:
    """The baseline: cross-entropy on the teacher's text, nothing else."""
    student, phase = trainer.student, trainer.phases
    for step, groups in trainer.steps("seqkd"):
        with phase("student"):
            stats = student.seqkd_backward(groups)
            student_norm = student.step(student.settings.seqkd_lr)
        trainer.record("seqkd", step, groups, stats, student_norm)


STAGES = {"warmup": warmup, "gad": gad, "seqkd": seqkd}


def train(trainer: Trainer) -> None:
    """All stages of the run in order, with the held-out evaluation before, between and after."""
    trainer.evaluate("before")
    for stage in trainer.stage_steps:
        if not trainer.is_done(stage):
            STAGES[stage](trainer)
            trainer.end_stage(stage)
        trainer.evaluate(f"after_{stage}")
    trainer.finish()
