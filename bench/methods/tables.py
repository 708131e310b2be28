"""docs/measured/methods.md and its drawings, from bench/results/methods.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench import record
from bench.methods.data import DESIGNS, ELSEWHERE, HELD_OUT, KEPT_OUT, SETS
from bench.methods.recipes import MEASURE_OF_TIME, METHODS, RECIPES
from bench.methods.results import BETTER, EQUAL, PAIRS, Difference, averaged, column, compared, of_data, seconds
from bench.methods.suite import BUDGETS, Row
from bench.paper import svg
from bench.paper.real import START
from bench.tables import Read, missing, provenance, rows_of, table
from gadcore.measure.intervals import Estimate, bootstrap

DOCUMENT = record.DOCUMENTS / "methods.md"
IMAGES = record.DOCUMENTS / "img"

HEADER = f"""# Methods beside each other

Generated from `bench/results/methods.json` by `python -m bench tables`: do not edit. Made by
`python -m bench methods --data house|real|{"|".join(DESIGNS)}`; settings: `bench/methods/recipes.py`, none of them
tuned on what is reported. All methods start from one model and see the same rows in batches of one size.

*Equal data*: every method makes as many steps. *Equal seconds*: it trains as long as `{MEASURE_OF_TIME}` did in the
same seed (sampling, discriminator and student; no loading, no saving), by more or fewer steps of one stage. Several
responses to a prompt are averaged before anything else. Differences are paired by prompt, over the mean of the seeds;
their first interval (95 %) is over prompts, ± over seeds. Nothing is claimed where one of the two holds 0."""

ABOUT = {
    "house": f"The built-in rows, SmolLM2-135M. The other domain: the kinds {' and '.join(KEPT_OUT)}, which no method "
    "was trained on.",
    "real": "Published responses of a closed model to AlpacaEval's prompts (no part of this project), SmolLM2-135M. "
    "The other domain: Vicuna's prompts.",
    "manners": "Student: a random Mistral of one layer, 32 wide, whose attention reaches three tokens back, trained "
    "from nothing; D: a Llama of two layers, 64 wide. The other domain: two letters in one prompt that no training "
    "prompt holds together.",
    "copies": "Prompts and settings as in `manners`; the student is a Llama of the same size that sees all.",
}
WORDS = {
    "style": "house style", "word_range": "length as the teacher's", "right": "right by the rule", "rouge_l": "ROUGE-L",
    "ngram_f1_4": "4-gram F1", "repetition": "repetition", "cut_share": "responses cut", "words": "words",
    "distinct_2": "distinct-2", "fresh_accuracy": "fresh D tells apart",
    "repeated": "say a 3-gram twice",
}  # fmt: skip
BUDGET_WORDS = {"data": "equal data", "seconds": "equal seconds"}
DOMAIN = {HELD_OUT: "held out", ELSEWHERE: "other domain"}


def files() -> dict[Path, str]:
    rows = rows_of("methods")
    return {DOCUMENT: document(), **{IMAGES / name: drawing for name, drawing in drawings(rows).items()}}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("methods")
    blocks = [HEADER, "What is compared: " + "; ".join(f"`{n}`, {m.says}" for n, m in METHODS.items()) + "."]
    if not rows:
        return "\n\n".join([*blocks, *missing("methods")]) + "\n"
    blocks.append(provenance(rows))
    for data in RECIPES:
        if any(row["data"] == data and row["method"] in METHODS for row in rows):
            blocks += [f"## {RECIPES[data].says.capitalize()}", ABOUT[data], *_section(rows, data)]
        elif data in DESIGNS:
            blocks += [f"## {RECIPES[data].says.capitalize()}", ABOUT[data], _prediction(data), "Not run."]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section(rows: Sequence[Row], data: str) -> list[str]:
    blocks = [_prediction(data)] if data in DESIGNS else []
    blocks += [take_away(rows, data), f"![methods](img/methods-{data}.svg)"]
    for budget in BUDGETS:
        mine = of_data(rows, data, budget)
        if not mine:
            continue
        blocks.append(f"### At {BUDGET_WORDS[budget]}, {data}")
        for each in SETS:
            blocks += [f"{DOMAIN[each].capitalize()}:", _figures(rows, mine, data, each)]
        for each in SETS:
            blocks += [f"Differences, {DOMAIN[each]}:", _differences(mine, each)]
    return blocks


def take_away(rows: Sequence[Row], data: str) -> str:
    """The sentence that a reader should take from a data set's rows: of its primary measure on held-out prompts."""
    measure, said = RECIPES[data].primary, []
    for budget in BUDGETS:
        mine = of_data(rows, data, budget)
        found = [each for pair in PAIRS if (each := compared(mine, *pair, HELD_OUT, measure)) is not None]
        if not found:
            continue
        clear = [_claim(each) for each in found if each.holds]
        open_pairs = [f"`{each.method}` and `{each.other}`" for each in found if not each.holds]
        parts = [*clear]
        if open_pairs:
            parts.append(f"no difference is shown between {_listed(open_pairs)}")
        seeds = min(each.seeds for each in found)
        of = "one seed, so nothing is known of other runs" if seeds == 1 else f"{seeds} seeds"
        said.append(f"At {BUDGET_WORDS[budget]} ({of}): {'; '.join(parts)}.")
    return " ".join([f"**What to take from it**, by {WORDS[measure]} on held-out prompts.", *said])


def _claim(found: Difference) -> str:
    word = "better" if found.better else "worse"
    return f"`{found.method}` is {word} than `{found.other}` ({signed(found)})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " nor between " + names[-1]


def _prediction(data: str) -> str:
    return f"Written before it ran: {DESIGNS[data].prediction}"


def _measures(mine: Sequence[Row], data: str) -> list[str]:
    """In the order of WORDS, the primary one first, those that every row has."""
    first = RECIPES[data].primary
    order = [first, *(name for name in WORDS if name != first)]
    return [name for name in order if all(name in row["sets"][HELD_OUT] for row in mine)]


def _figures(rows: Sequence[Row], mine: Sequence[Row], data: str, each: str) -> str:
    measures = _measures(mine, data)
    start = next((row for row in rows if row["data"] == data and row["method"] == START), None)
    lines = []
    if start is not None:
        taught = {"sets": start["teacher"]}
        for name, row in (("teacher", taught), (START, start)):
            cells = [mean_of(bootstrap(found)) if (found := column(row, each, m)) else "-" for m in measures]
            lines.append([name, "-", "-", "-", *cells])
    for name in METHODS:
        of_method = [row for row in mine if row["method"] == name]
        if of_method:
            steps = " + ".join(f"{fmean(r['steps'].get(s, 0) for r in of_method):.0f}" for s in of_method[0]["steps"])
            lines.append(
                [name, str(len(of_method)), steps, f"{fmean(map(seconds, of_method)):.0f}"]
                + [mean_of(bootstrap(averaged(of_method, each, measure))) for measure in measures]
            )
    return table(["method", "seeds", "steps", "seconds", *(WORDS[m] for m in measures)], lines)


def _differences(mine: Sequence[Row], each: str) -> str:
    measures = [m for m in _measures(mine, mine[0]["data"]) if m in BETTER]
    lines = []
    for method, other in PAIRS:
        found = [compared(mine, method, other, each, measure) for measure in measures]
        if any(found):
            apart = _apart(mine, method, other)
            cells = ["-" if one is None else signed(one) + (" *" if one.holds else "") for one in found]
            lines.append([f"{method} - {other}{apart}", *cells])
    if not lines:
        return "No two methods have a seed in common."
    told = "\\* where neither interval holds 0; of so many, some do by chance."
    return table(["difference", *(WORDS[m] for m in measures)], lines) + f"\n\n{told}"


def _apart(mine: Sequence[Row], method: str, other: str) -> str:
    """Told where two methods should have trained equally long and have not."""
    if mine[0]["budget"] != "seconds":
        return ""
    one, two = (fmean(seconds(row) for row in mine if row["method"] == name) for name in (method, other))
    return "" if abs(one - two) <= EQUAL * max(one, two) else f" ({one:.0f} s and {two:.0f} s)"


def mean_of(found: Estimate) -> str:
    """A mean with its interval."""
    digits = 1 if abs(found.mean) >= 10 else 3
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def signed(found: Difference) -> str:
    """A difference with both of its intervals."""
    over = found.over_prompts
    seeds = "" if found.over_seeds is None else f" ± {found.over_seeds:.3f}"
    return f"{over.mean:+.3f} [{over.low:+.3f}, {over.high:+.3f}]{seeds}"


def drawings(rows: Sequence[Row]) -> dict[str, str]:
    """By file name: a data set's primary measure on held-out prompts over seconds of training, a point a budget."""
    made = {}
    for data, recipe in RECIPES.items():
        start = next((row for row in rows if row["data"] == data and row["method"] == START), None)
        first = [] if start is None else [(0.0, fmean(averaged([start], HELD_OUT, recipe.primary)))]
        series, bars = {}, {}
        for name in METHODS:
            points, upright = list(first), []
            for budget in BUDGETS:
                mine = [row for row in of_data(rows, data, budget) if row["method"] == name]
                if mine:
                    found = bootstrap(averaged(mine, HELD_OUT, recipe.primary))
                    at = round(fmean(map(seconds, mine)), 1)
                    points.append((at, found.mean))
                    upright.append((at, found.low, found.high))
            if upright:
                series[name], bars[name] = [sorted(points)], upright
        if series:
            title = f"{WORDS[recipe.primary].capitalize()}, held out: {recipe.says}"
            made[f"methods-{data}.svg"] = svg.lines(title, "seconds of training", series, bars=bars)
    return made
