"""What the rows of `bench methods` say: paired differences of methods with intervals over prompts and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.methods.recipes import MEASURE_OF_TIME, METHODS
from bench.methods.suite import Row, numbers
from gadcore.measure.intervals import Estimate, difference, margin

# (method, the one it is held against).
PAIRS = (
    (MEASURE_OF_TIME, "seqkd"),
    (MEASURE_OF_TIME, "soda"),
    (MEASURE_OF_TIME, "gad"),
    (MEASURE_OF_TIME, "gad_frozen"),
    ("gad", "seqkd"),
    ("soda", "seqkd"),
)
# 1: more is better, -1: less is. Of the others one wants what the teacher has, and nothing is claimed of them.
BETTER = {
    "style": 1, "word_range": 1, "right": 1, "rouge_l": 1, "ngram_f1_4": 1,
    "repetition": -1, "repeated": -1, "cut_share": -1,
}  # fmt: skip
# Beyond this, two runs have not trained equally long.
EQUAL = 0.1


@dataclass(frozen=True)
class Difference:
    """method minus other. over_prompts: interval of the mean over seeds, paired by prompt. over_seeds: half the width
    of the t interval of the seeds' mean differences; None for one seed. seeds: that both were run with."""

    method: str
    other: str
    measure: str
    over_prompts: Estimate
    over_seeds: float | None
    seeds: int

    @property
    def holds(self) -> bool:
        """Whether 0 lies outside both intervals; of one seed, outside that over prompts."""
        mean, clear = self.over_prompts.mean, self.over_prompts.low > 0 or self.over_prompts.high < 0
        return clear and (self.over_seeds is None or abs(mean) > self.over_seeds)

    @property
    def better(self) -> bool:
        return self.over_prompts.mean * BETTER[self.measure] > 0


def of_data(rows: Sequence[Row], data: str, budget: str) -> list[Row]:
    return [row for row in rows if row["data"] == data and row["budget"] == budget and row["method"] in METHODS]


def column(row: Row, each: str, measure: str) -> list[float] | None:
    """A row's values by prompt of a set."""
    text = row["sets"][each].get(measure)
    return None if text is None else numbers(text)


def averaged(rows: Sequence[Row], each: str, measure: str) -> list[float]:
    """The mean over rows (seeds) of every prompt's value."""
    columns = [found for row in rows if (found := column(row, each, measure)) is not None]
    return [fmean(values) for values in zip(*columns, strict=True)]


def compared(rows: Sequence[Row], method: str, other: str, each: str, measure: str) -> Difference | None:
    """rows: of one data set and budget. None where the two have no seed in common, or not that measure."""
    mine, theirs = ({row["seed"]: row for row in rows if row["method"] == name} for name in (method, other))
    seeds = [
        seed
        for seed in sorted(mine.keys() & theirs.keys())
        if all(column(side[seed], each, measure) is not None for side in (mine, theirs))
    ]
    if not seeds:
        return None
    first, second = (averaged([side[seed] for seed in seeds], each, measure) for side in (theirs, mine))
    by_seed = [fmean(averaged([mine[s]], each, measure)) - fmean(averaged([theirs[s]], each, measure)) for s in seeds]
    return Difference(method, other, measure, difference(first, second), margin(by_seed), len(seeds))


def seconds(row: Row) -> float:
    return sum(row["seconds"].values())
