"""A prediction beside what a run measured, state by state and phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from gadcore.errors import UserError
from gadcore.memory.holdings import WORK_OF
from gadcore.plan.memory import Case
from gadcore.plan.planning import Plan, as_given
from gadcore.plan.workload import Workload, at_lengths
from gadcore.record.tracking import Row, read_rows

_PHASES = ("synchronise", "rollout", "discriminator", "student")
# What a step is made of beside them.
_OFFLOAD = "offload"


@dataclass(frozen=True)
class Comparison:
    """what: "time" in seconds or "memory", the peak in bytes, of a step. Medians over steps of a stage."""

    what: str
    stage: str
    name: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def compare(folder: Path, case: Case) -> list[Comparison]:
    """The steps of a run's metrics.jsonl beside what is predicted for their own token counts.

    Raises UserError where the folder has no step that sampled.
    """
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "tokens/sampled" in row and "time/rollout" in row]
    if not rows:
        raise UserError(f"plan.against = {folder} has no step that sampled: there is nothing to compare with")
    found: list[Comparison] = []
    for stage in ("warmup", "gad"):
        steps = [row for row in rows if row["stage"] == stage]
        if steps:
            plans = [as_given(replace(case, work=_work_of(row, case.work))) for row in steps]
            found += _times(stage, steps, plans)
            if stage == "gad":
                found += _memory(steps, plans)
    return found


def _work_of(row: Row, work: Workload) -> Workload:
    """The workload of one step, from its token counts."""
    prompts = round(row["tokens/sampled"] / (row["length/student"] * work.samples))
    teacher = float(row["length/teacher"])
    prompt = (row["tokens/discriminator"] - row["tokens/sampled"]) / prompts - teacher
    return at_lengths(
        work, prompts=prompts, prompt=max(prompt, 1.0), response=float(row["length/student"]), teacher=teacher
    )


def _times(stage: str, steps: Sequence[Row], plans: Sequence[Plan]) -> list[Comparison]:
    found = []
    for phase in _PHASES:
        parts = [f"time/{part}" for part in WORK_OF.get(phase, (phase,))]
        measured = [sum(row.get(part, 0.0) for part in parts) for row in steps if f"time/{phase}" in row]
        predicted = [plan.time.steps[stage].get(phase, 0.0) for plan in plans]
        if phase == "rollout" and not any("time/synchronise" in row for row in steps):
            predicted = [
                seconds + plan.time.steps[stage].get("synchronise", 0.0)
                for seconds, plan in zip(predicted, plans, strict=True)
            ]
        if measured and median(predicted) > 0:
            found.append(Comparison("time", stage, phase, median(predicted), median(measured)))
    moving = [row["memory/moving_s"] for row in steps if "memory/moving_s" in row]
    if any(moving):
        predicted = [plan.time.steps[stage][_OFFLOAD] for plan in plans]
        found.append(Comparison("time", stage, _OFFLOAD, median(predicted), median(moving)))
    totals = [row["time/total"] for row in steps]
    predicted = [sum(plan.time.steps[stage].values()) for plan in plans]
    found.append(Comparison("time", stage, "step", median(predicted), median(totals)))
    return found


def _memory(steps: Sequence[Row], plans: Sequence[Plan]) -> list[Comparison]:
    found = []
    for state in plans[0].memory:
        measured = [row[f"memory/{state}_peak"] for row in steps if f"memory/{state}_peak" in row]
        if measured:
            predicted = median(plan.memory[state].total for plan in plans)
            found.append(Comparison("memory", "gad", state, predicted, median(measured)))
    return found
