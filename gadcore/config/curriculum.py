"""The settings of what held-out figures decide before GAD: when its stages end, and whether the gate opens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gadcore.config.kinds import NonNegative, Positive, Rate, Section, Share


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


class GateSettings(Section):
    """The GAD stage begins only where the discriminator's held-out accuracy is of use; else the warmup goes on."""

    enabled: bool = False
    low: Share = Field(0.55, description="Below this accuracy rewards are noise; 0: no limit.")
    high: Share = Field(0.98, description="Above it the student is too far off for rewards to guide it; 1: no limit.")
    rows: Positive = Field(64, description="Held-out prompts of a measurement, one sample each.")
    every: Positive = Field(5, description="Further warmup steps between two measurements.")
    extra_steps: Positive = Field(50, description="Further warmup steps at most.")
    when_closed: Literal["error", "go_on"] = Field(
        "error", description="What to do where the gate is still closed after the extra steps."
    )
