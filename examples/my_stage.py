"""A stage of your own, with the whole command line: python examples/my_stage.py --run.dir runs/patient

The GAD stage with a patient discriminator: where D tells the batch's pairs apart anyway, it rests, so that the student
can catch up. Settings, checkpoints, --resume, metrics and report are those of every run.
"""

from gadcore.algorithm import STAGES, Run, reference_logprobs, score_and_update
from gadcore.run import program
from gadcore.train.step import StepResult

SURE = 0.9


def patient_gad(run: Run) -> None:
    """gadcore.algorithm.gad, but for the line that decides whether D learns from this batch."""
    student, discriminator, phase = run.student, run.discriminator, run.phases
    run.begin("gad")
    run.ensure_reference()
    for step, groups in run.steps("gad"):
        result = StepResult("gad", step, groups)
        run.sample(groups, "gad", step)
        with phase("discriminator"):
            result.scores = discriminator.score(groups, backward=False)
        if result.scores.accuracy < SURE:
            result.scores, result.discriminator_norm = score_and_update(run, groups, step)
        result.rewards = run.rewards(groups, result.scores)
        reference = reference_logprobs(run, groups)
        with phase("student"):
            result.stats = student.grpo_backward(groups, result.for_grpo(), reference)
        with phase("student_update"):
            result.student_norm = student.step(student.settings.lr)
        run.record(result)


if __name__ == "__main__":
    STAGES["gad"] = patient_gad
    program()
