"""The curriculum: stages before GAD that end by themselves, on held-out figures.

    sft      v_n = the student's cross-entropy on held-out responses of the teacher
    warmup   v_n = 1 - D's accuracy on held-out prompts, one sample of the student each

Every few steps of a stage there is a look, which gives a v_n. A stage ends at the plateau of its own, by the rule of
gadcore.train.convergence: min(v_1..v_(n-p)) - min(v_(n-p+1)..v_n) <= tolerance with p = patience, n > p. The GAD stage
is looked at as well, and ends by other rules. Beside D's held-out accuracy stands that on the batches it was trained on
since the look before: where the two part, D learns its few texts by heart (gadcore.record.health warns of it).
Nothing here reads a model: a state and a measurement give the next state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from gadcore.config.curriculum import CurriculumSettings
from gadcore.train.convergence import is_plateau


@dataclass(frozen=True)
class Look:
    """step: global. value: D's accuracy on held-out prompts, or where a stage has no D the student's cross-entropy, in
    nats. trained: D's mean accuracy on the training batches since the look before, each from before its update; None
    without D."""

    stage: str
    step: int
    value: float
    trained: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        if self.trained is None:
            return {"heldout/ce": self.value}
        return {"heldout/accuracy": self.value, "heldout/train_accuracy": self.trained}


@dataclass(frozen=True)
class Curriculum:
    """looks: all of them. ends: the last step, within the stage, of every stage that a look has ended. seen: D's
    accuracy on the training batches since the latest look."""

    looks: tuple[Look, ...] = field(default=())
    ends: dict[str, int] = field(default_factory=dict)
    seen: tuple[float, ...] = field(default=())

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Curriculum:
        """From asdict(), which may have been through JSON."""
        looks = tuple(Look(**look) for look in state.get("looks", ()))
        return cls(looks, dict(state.get("ends", {})), tuple(state.get("seen", ())))

    def after(self, accuracy: float | None) -> Curriculum:
        """After a step; accuracy: D's on its batch, None for a step without D."""
        return self if accuracy is None else replace(self, seen=(*self.seen, accuracy))

    def look(self, stage: str, step: int, stage_step: int, value: float, settings: CurriculumSettings) -> Curriculum:
        """The state after one more look, at the global step and the step within the stage."""
        looks = (*self.looks, Look(stage, step, value, fmean(self.seen) if self.seen else None))
        falling = [each.value if each.trained is None else 1 - each.value for each in looks if each.stage == stage]
        asked = {"sft": settings.end_sft, "warmup": settings.end_warmup}.get(stage, False)
        ended = asked and stage not in self.ends and is_plateau(falling, settings.patience, settings.tolerance)
        return Curriculum(looks, self.ends | {stage: stage_step} if ended else self.ends)

    def message(self) -> str:
        """One sentence on the latest look and what follows from it; at least one is needed."""
        look = self.looks[-1]
        ends = look.stage in self.ends
        if look.trained is None:
            end = ": it no longer falls, the cross-entropy ends" if ends else ""
            return f"Curriculum: held-out cross-entropy {look.value:.3f} after step {look.step}{end}."
        end = ": it no longer rises, the warmup ends" if ends else ""
        return (
            f"Curriculum: held-out accuracy of the discriminator {look.value:.3f} after step {look.step}, "
            f"{look.trained:.3f} on what it was trained on{end}."
        )

    def told(self) -> list[str]:
        """Sentences for the report: how each stage was looked at, and whether that ended it."""
        sentences = []
        for stage in dict.fromkeys(look.stage for look in self.looks):
            looks = [look for look in self.looks if look.stage == stage]
            what = "cross-entropy" if looks[-1].trained is None else "accuracy of the discriminator"
            values = ", ".join(
                f"{each.value:.3f}" + ("" if each.trained is None else f" ({each.trained:.3f})") for each in looks
            )
            beside = "" if looks[-1].trained is None else " (in brackets on what it was trained on)"
            ended = f"; its plateau ended the stage after step {self.ends[stage]}" if stage in self.ends else ""
            sentences.append(f"Held-out {what} in the stage {stage}{beside}: {values}{ended}.")
        return sentences
