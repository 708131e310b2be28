"""What each finding must show in a seed to count as reproduced there; tests and docs/measured/findings.md ask this."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
# The share of the seeds in which a finding must hold to count as reproduced; in no more than the rest of them, it did
# not reproduce.
NEEDED = 0.8
Arms = dict[str, Row]


@dataclass(frozen=True)
class Gate:
    """where: geometry or language. arms: rows that `holds` needs. holds: whether one seed's rows show it. required:
    tests fail where it does not hold in seed 0; the others may come out as they like."""

    experiment: str
    where: str
    says: str
    arms: tuple[str, ...]
    holds: Callable[[Arms], bool]
    required: bool = True


def curve(row: Row, key: str, stage: str = "gad") -> list[float]:
    """Values of a stage's curve, in order."""
    return [p[key] for p in row["curve"] if p["stage"] == stage and key in p]


def _valid(row: Row) -> float:
    return row["in_domain"]["valid"]


def _rise(row: Row) -> float:
    """How much the fresh accuracy ended above its minimum."""
    values = [p["accuracy"] for p in row["fresh"]]
    return values[-1] - min(values)


def _sees(row: Row) -> bool:
    points = row["fresh"]
    return points[-1]["accuracy"] <= points[0]["accuracy"] - 0.1


GATES = (
    Gate("mixture", "skewed", "SeqKD keeps 3 modes, reverse KL > 1", ("seqkd",),
         lambda a: a["seqkd"]["modes"] == 3 and a["seqkd"]["reverse_kl"] > 1),
    Gate("mixture", "skewed", "GAD keeps 1 mode, reverse KL < .6", ("gad",),
         lambda a: a["gad"]["modes"] == 1 and a["gad"]["reverse_kl"] < 0.6),
    Gate("mixture", "skewed", "GAD within .25 of the oracle's reverse KL", ("gad", "oracle"),
         lambda a: abs(a["gad"]["reverse_kl"] - a["oracle"]["reverse_kl"]) <= 0.25),
    Gate("mixture", "skewed", "a frozen D: reverse KL > 2", ("frozen",), lambda a: a["frozen"]["reverse_kl"] > 2),
    Gate("language", "styles", "SeqKD valid .25 to .36", ("seqkd",), lambda a: 0.25 <= _valid(a["seqkd"]) <= 0.36),
    Gate("language", "styles", "GAD valid >= .90 with reverse KL < 1.5", ("gad",),
         lambda a: _valid(a["gad"]) >= 0.9 and a["gad"]["in_domain"]["reverse_kl"] < 1.5),
    Gate("language", "styles", "GAD valid >= .90 out of domain", ("gad",),
         lambda a: a["gad"]["out_of_domain"]["valid"] >= 0.9, required=False),
    Gate("language", "styles", "a frozen D: valid ends .3 or more below the run's own peak", ("frozen",),
         lambda a: _valid(a["frozen"]) <= max(p["valid"] for p in a["frozen"]["curve"]) - 0.3),
    Gate("language", "styles", "a frozen D: valid first rises above .5", ("frozen",),
         lambda a: max(curve(a["frozen"], "valid")) > 0.5, required=False),
    Gate("language", "styles", "no warmup of G: valid <= .05", ("no_student_warmup",),
         lambda a: _valid(a["no_student_warmup"]) <= 0.05),
    Gate("language", "styles", "no warmup of D: valid below GAD's", ("no_discriminator_warmup", "gad"),
         lambda a: _valid(a["no_discriminator_warmup"]) < _valid(a["gad"]), required=False),
    Gate("language", "styles", "GAD's 4-gram F1 below SeqKD's", ("gad", "seqkd"),
         lambda a: a["gad"]["in_domain"]["ngram_f1"]["4"] < a["seqkd"]["in_domain"]["ngram_f1"]["4"], required=False),
    Gate("language", "styles", "a hacked student's answers are longer than 1.2 times the teacher's", ("frozen",),
         lambda a: a["frozen"]["in_domain"]["length"] > 1.2 * a["frozen"]["in_domain"]["teacher_length"],
         required=False),
    Gate("language", "styles", "healthy: fresh accuracy ends .1 or more below its start", ("gad",),
         lambda a: _sees(a["gad"]), required=False),
    Gate("language", "styles", "healthy: fresh accuracy never ends .1 above its minimum", ("gad",),
         lambda a: _rise(a["gad"]) < 0.1, required=False),
    Gate("language", "styles", "hacked: fresh accuracy ends .1 or more above its minimum", ("frozen",),
         lambda a: _rise(a["frozen"]) >= 0.1, required=False),
    # Where GAD is expected to win nothing.
    Gate("mixture", "symmetric", "neither GAD nor the oracle leaves SeqKD's 3 modes", ("seqkd", "gad", "oracle"),
         lambda a: a["seqkd"]["modes"] == a["gad"]["modes"] == a["oracle"]["modes"] == 3, required=False),
    Gate("language", "parity", "GAD wins less than .1 over SeqKD, the oracle more than .3", ("seqkd", "gad", "oracle"),
         lambda a: _valid(a["gad"]) < _valid(a["seqkd"]) + 0.1 and _valid(a["oracle"]) > _valid(a["seqkd"]) + 0.3,
         required=False),
)  # fmt: skip


def outcomes(gate: Gate, rows: Sequence[Row]) -> dict[int, bool]:
    """By seed, whether the gate holds, for the seeds that have all its arms."""
    by_seed: dict[int, Arms] = {}
    for row in rows:
        if row["experiment"] == gate.experiment and gate.where == (row.get("geometry") or row.get("language")):
            by_seed.setdefault(row["seed"], {})[row["arm"]] = row
    return {seed: gate.holds(arms) for seed, arms in sorted(by_seed.items()) if set(gate.arms) <= set(arms)}


def verdict(held: dict[int, bool]) -> str:
    """In words, over the seeds."""
    if not held:
        return "not run"
    count, of = sum(held.values()), len(held)
    # Counts, since .8 of 10 seeds is not 8 in floating point.
    needed = math.ceil(round(NEEDED * of, 6))
    word = "reproduced" if count >= needed else "did not reproduce" if count <= of - needed else "mixed"
    return f"{word} ({count} of {of} seeds)"
