"""The settings of the stages before GAD that end by themselves, on held-out figures."""

from __future__ import annotations

from pydantic import Field

from gadcore.config.kinds import NonNegative, Positive, Rate, Section


class CurriculumSettings(Section):
    """Looks at held-out prompts on the way, and what ends the stages before GAD (gadcore/train/curriculum.py)."""

    every: NonNegative = Field(
        0,
        description="Steps between two looks at held-out prompts, in every stage: the student's cross-entropy before "
        "the warmup, the discriminator's accuracy from then on; 0: none.",
    )
    rows: Positive = Field(64, description="Held-out prompts of a look, one sample each where there are samples.")
    end_sft: bool = Field(False, description="End the cross-entropy where its held-out figure no longer falls.")
    end_warmup: bool = Field(
        False, description="End the warmup where the discriminator's held-out accuracy no longer rises."
    )
    patience: Positive = Field(2, description="Looks without a new best that are a plateau.")
    tolerance: Rate = Field(0.01, description="What a new best must be better by: of nats, or of the accuracy.")

    def check(self, *, held_out: bool, discriminator: bool) -> None:
        """Raises ValueError for settings that contradict each other. held_out: there are such rows. discriminator: the
        warmup trains it."""
        ends = [f"curriculum.{name}" for name in ("end_sft", "end_warmup") if getattr(self, name)]
        if ends and not self.every:
            raise ValueError(
                f"{' and '.join(ends)} read what a look at held-out prompts finds, and curriculum.every = 0 looks at "
                "none: set curriculum.every = 10, for example"
            )
        if self.every and not held_out:
            raise ValueError(
                f"curriculum.every = {self.every} needs held-out prompts, data.eval has none: give some, or set it to 0"
            )
        if self.end_warmup and not discriminator:
            raise ValueError(
                "curriculum.end_warmup reads the discriminator's accuracy, and algorithm.discriminator_warmup = false "
                "keeps it from learning: set one of them back"
            )
