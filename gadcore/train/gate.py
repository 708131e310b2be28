"""The gate before the GAD stage: it opens where D can tell teacher from student, but not at a glance.

    low <= accuracy <= high      accuracy: D's, on held-out prompts, one sample of the student each

Below, rewards are noise, and GRPO would train the student on it; above, every sample is far from the teacher's and no
reward says which way to go. While it is closed the warmup goes on, which trains both models. Nothing here reads a
model: a state and a measurement give the next state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gadcore.config.curriculum import GateSettings


@dataclass(frozen=True)
class Gate:
    """measured: (global step, accuracy) of every measurement. extra: further warmup steps that were asked for."""

    measured: tuple[tuple[int, float], ...] = field(default=())
    extra: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Gate:
        """From asdict(), which may have been through JSON."""
        return cls(tuple((step, accuracy) for step, accuracy in state.get("measured", ())), state.get("extra", 0))

    def look(self, step: int, accuracy: float) -> Gate:
        return replace(self, measured=(*self.measured, (step, accuracy)))

    def is_open(self, settings: GateSettings) -> bool:
        """Whether the latest measurement opens the gate; ValueError where there is none."""
        if not self.measured:
            raise ValueError("the gate was not measured")
        return settings.low <= self.measured[-1][1] <= settings.high

    def further_steps(self, settings: GateSettings) -> int:
        """Warmup steps to add now: 0 where the gate is open, or closed for good and the run is to go on."""
        return 0 if self.is_open(settings) else min(settings.every, max(settings.extra_steps - self.extra, 0))

    def extended(self, steps: int) -> Gate:
        return replace(self, extra=self.extra + steps)

    def fails(self, settings: GateSettings) -> bool:
        """Whether the gate is closed, the extra steps are used up and the run is not to go on."""
        closed = not self.is_open(settings) and not self.further_steps(settings)
        return closed and settings.when_closed == "error"

    def advice(self, settings: GateSettings) -> str:
        """What to change where it stays closed."""
        accuracy = self.measured[-1][1]
        cause = (
            "raise discriminator.lr or algorithm.discriminator_steps"
            if accuracy < settings.low
            else "raise student.warmup_lr or schedule.warmup_steps, and check that both sides end in one end marker"
        )
        return (
            f"the gate stays closed: held-out accuracy of the discriminator {accuracy:.3f}, asked for is one between "
            f"{settings.low:g} and {settings.high:g}: {cause}; or go on with --resume auto and a larger "
            'gate.extra_steps, or with gate.when_closed = "go_on"'
        )

    def message(self, settings: GateSettings) -> str:
        """One sentence on the latest measurement and what follows from it."""
        step, accuracy = self.measured[-1]
        where = f"held-out accuracy of the discriminator {accuracy:.3f} after step {step}"
        band = f"the gate is open between {settings.low:g} and {settings.high:g}"
        if self.is_open(settings):
            extra = f" after {self.extra} further warmup steps" if self.extra else ""
            return f"Gate: {where}; {band}: the GAD stage begins{extra}."
        more = self.further_steps(settings)
        if more:
            return f"Gate: {where}; {band}: the warmup goes on for {more} further steps."
        end = "the GAD stage begins all the same" if settings.when_closed == "go_on" else "the run stops"
        return f"Gate: {where}; {band}: still closed after all {self.extra} extra warmup steps, {end}."
