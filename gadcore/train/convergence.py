"""The convergence rule: the GAD stage ends where a fresh discriminator no longer finds it harder to tell the student.

The accuracy a_1, a_2, .. of a discriminator that is trained from scratch on held-out pairs (gadcore.measure.fresh) is
taken when the stage begins, every few steps, and at its end. With the settings rise, tolerance, patience:

    rise       a_n >= min(a_1..a_n) + rise
    plateau    min(a_1..a_(n-p)) - min(a_(n-p+1)..a_n) <= tolerance,  p = patience, n > p

Either ends the stage, and however it ends, the student of the minimum (the earliest, where several are equal) is the
one that is kept. The minimum of noisy figures lies below the student's true accuracy: measure that anew, with eval.
Beside measure(), nothing here reads a model: a state and a measurement give the next state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from gadcore.config.settings import ConvergenceSettings, FreshSettings
from gadcore.measure.fresh import DiscriminatorLike, FreshResult, GroupT, fresh_discriminator

Stop = Literal["plateau", "rise"]


def measure(
    groups: Sequence[GroupT],
    make_discriminator: Callable[[], DiscriminatorLike[GroupT]],
    settings: ConvergenceSettings,
    seed: int,
) -> FreshResult:
    """The accuracy of a fresh discriminator on groups with samples, by the settings of the rule."""
    fresh = FreshSettings(steps=settings.steps, batch_size=settings.step_rows, seed=seed, cross_fit=settings.cross_fit)
    return fresh_discriminator(groups, make_discriminator, fresh)


def stop_reason(accuracies: Sequence[float], settings: ConvergenceSettings) -> Stop | None:
    """What the rule says after these measurements, at least one; None: go on. A rise comes before a plateau."""
    if accuracies[-1] >= min(accuracies) + settings.rise:
        return "rise"
    return "plateau" if is_plateau(accuracies, settings.patience, settings.tolerance) else None


def is_plateau(values: Sequence[float], patience: int, tolerance: float) -> bool:
    """Whether the latest `patience` of values that should fall are not below all before them by more than tolerance."""
    before, latest = values[:-patience], values[-patience:]
    return bool(before) and min(before) - min(latest) <= tolerance


@dataclass(frozen=True)
class Convergence:
    """measured: (global step, accuracy, low, high) of every measurement, low and high its interval.
    stopped: why the stage was ended, "" where it was not."""

    measured: tuple[tuple[int, float, float, float], ...] = field(default=())
    stopped: str = ""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Convergence:
        """From asdict(), which may have been through JSON."""
        measured = tuple((step, a, low, high) for step, a, low, high in state.get("measured", ()))
        return cls(measured, state.get("stopped", ""))

    @property
    def best(self) -> tuple[int, float] | None:
        """(global step, accuracy) of the minimum, None before the first measurement."""
        return min(((step, a) for step, a, _, _ in self.measured), key=lambda each: each[1], default=None)

    def look(
        self, step: int, accuracy: float, interval: tuple[float, float], settings: ConvergenceSettings
    ) -> Convergence:
        """The state after one more measurement."""
        measured = (*self.measured, (step, accuracy, *interval))
        return replace(self, measured=measured, stopped=stop_reason([a for _, a, _, _ in measured], settings) or "")

    def message(self) -> str:
        """One sentence on the latest measurement and what follows from it; at least one is needed."""
        step, accuracy, low, high = self.measured[-1]
        text = f"Convergence: accuracy of a fresh discriminator {accuracy:.3f} ({low:.3f} to {high:.3f}) at step {step}"
        assert self.best is not None
        best, minimum = self.best
        if self.stopped == "rise":
            return f"{text}, up from {minimum:.3f} at step {best}: the GAD stage ends, back to step {best}."
        text += ", a new minimum" if best == step else f", minimum {minimum:.3f} at step {best}"
        if self.stopped == "plateau":
            return f"{text}: it no longer falls, the GAD stage ends with the student of step {best}."
        return text + "."

    def summary(self) -> dict[str, Any] | None:
        """What summary.json says, None where nothing was measured."""
        return {**asdict(self), "best": self.best} if self.measured else None
