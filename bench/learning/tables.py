"""What docs/measured/adapters.md says of learning, from bench/results/learning.json."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bench.learning.suite import ALL_WEIGHTS, PATHS, RATES_SEED, SIDES, STAGES
from bench.methods.results import BETTER, Difference, averaged, compared
from bench.methods.tables import WORDS, mean_of, signed
from bench.tables import Row, missing, provenance, table
from gadcore.measure.intervals import bootstrap

TITLE = "## Does it learn as with all weights"
ABOUT = """Made from bench/results/learning.json, which `python -m bench learning` measures: the default job under
every side. After its cross-entropy the student is one of SeqKD, after its GAD stage one of GAD. Held-out prompts of the
built-in rows, several responses each, averaged by prompt. Differences are paired by prompt, over the mean of the
seeds; their first interval (95 %) is over prompts, ± over seeds (t). KL by GAD: nats a token between the student and
the one that GAD began with, over its last steps: how far it went."""
BEFORE, SEQKD, GAD = STAGES
STAGE_WORDS = {SEQKD: "After cross-entropy (SeqKD)", GAD: "After GAD"}
# What a difference is claimed of, the first one as in the methods' table.
PRIMARY = "style"


def blocks(rows: Sequence[Row]) -> list[str]:
    """The section; rows: of the suite `learning`."""
    if not rows:
        return [TITLE, ABOUT, *missing("learning")]
    told = "Sides: " + "; ".join(f"`{name}`, {side.says}" for name, side in SIDES.items()) + "."
    found = [TITLE, ABOUT, told, provenance(rows), *_rates([row for row in rows if "rate" in row])]
    runs = [row for row in rows if "sets" in row]
    if runs:
        found.append(take_away(runs))
        for stage, words in STAGE_WORDS.items():
            found += [f"### {words}", _figures(runs, stage), _differences(runs, stage)]
    return found


def take_away(runs: Sequence[Row]) -> str:
    """The sentence that a reader should take from the rows: of the primary measure, after either method."""
    said = []
    for stage, words in STAGE_WORDS.items():
        found = _beside(runs, stage, PRIMARY)
        parts = [f"`{d.method}` {_said(d)}" for d in found]
        said.append(f"{words}: {'; '.join(parts)}.")
    return f"**Beside all weights**, by {WORDS[PRIMARY]}. " + " ".join(said)


def _said(found: Difference) -> str:
    told = f"{signed(found)}, {found.seeds} seed{'s' if found.seeds > 1 else ''}"
    if not found.holds:
        return f"no difference shown ({told})"
    return f"{'better' if found.better else 'worse'} ({told})"


def _beside(runs: Sequence[Row], stage: str, measure: str) -> list[Difference]:
    others = [name for name in SIDES if name != ALL_WEIGHTS]
    found = [compared(runs, name, ALL_WEIGHTS, stage, measure) for name in others]
    return [each for each in found if each is not None]


def _figures(runs: Sequence[Row], stage: str) -> str:
    moved = stage == GAD
    header = ["side", "seeds", "minutes, whole job", *(["KL by GAD"] if moved else [])]
    lines = [["before any training", *["-"] * (len(header) - 1), *_means(runs, BEFORE)]]
    for name in SIDES:
        mine = [row for row in runs if row["method"] == name]
        if mine:
            minutes = fmean(row["seconds"]["total"] for row in mine) / 60
            kl = [f"{fmean(row['kl'] for row in mine):.4f}"] if moved else []
            lines.append([name, str(len(mine)), f"{minutes:.0f}", *kl, *_means(mine, stage)])
    return table([*header, *(WORDS[name] for name in PATHS)], lines)


def _means(rows: Sequence[Row], stage: str) -> list[str]:
    columns = [averaged(rows, stage, name) for name in PATHS]
    return [mean_of(bootstrap(values)) if values else "-" for values in columns]


def _differences(runs: Sequence[Row], stage: str) -> str:
    measures = [name for name in PATHS if name in BETTER]
    lines = {}
    for name in measures:
        for found in _beside(runs, stage, name):
            cells = lines.setdefault(found.method, dict.fromkeys(measures, "-"))
            cells[name] = signed(found) + (" *" if found.holds else "")
    if not lines:
        return f"No side has a seed in common with `{ALL_WEIGHTS}`."
    body = [[f"{method} - {ALL_WEIGHTS}", *cells.values()] for method, cells in lines.items()]
    marked = "\\* where neither interval holds 0; of so many, some do by chance."
    return table(["difference", *(WORDS[name] for name in measures)], body) + f"\n\n{marked}"


def _rates(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    steps = list(rows[0]["ce"])
    body = [[row["method"], row["rate"], *(f"{row['ce'][step]:.3f}" for step in steps)] for row in rows]
    about = (
        f"Cross-entropy of the held-out rows, nats a token, on seed {RATES_SEED}, which no other row is of "
        "(`python -m bench learning --rates`): each side has the best of its three. GAD's is a fifth of it."
    )
    return [about, table(["side", "learning rate", *(f"after step {step}" for step in steps)], body)]
