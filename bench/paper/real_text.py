"""The section of docs/measured/findings.md on real text, and its drawings, from the rows of bench.paper.real."""

from __future__ import annotations

from collections.abc import Sequence

from bench.paper import svg
from bench.tables import Row, missing, provenance, table

START = "start"
GRAMS = tuple(f"ngram_f1_{n}" for n in (1, 2, 3, 4))
# Beyond this, two runs have not trained equally long.
EQUAL = 0.1

ABOUT = """The teacher is `gpt4_0613_concise`, a closed model: its published responses to AlpacaEval's prompts, under
CC BY-NC 4.0 and no part of this project. GAD and SeqKD (`python -m gadcore.run seqkd`) start from one model and see the
same prompts in batches of one size. Seconds are wall time of sampling, discriminator and student together, on a machine
that other work ran on too; loading, evaluations and checkpoints are not counted. SeqKD samples nothing and has no
discriminator, so it takes many more steps in the same time. One run each: intervals (95 %) cover the choice of held-out
prompts, neither another draw of responses nor another run. Made by `python -m bench real GAD_RUN SEQKD_RUN`."""

FRESH = """fresh accuracy: how often new discriminators, trained on half of the pairs and asked about the other half,
prefer the teacher's response; .5: they cannot tell. It is a lower bound: with more pairs and steps they would find
more."""

BESIDE = """Differences are the first run's figure minus the other's, at the checkpoints with the most nearly equal
seconds, paired by prompt; * marks those whose interval excludes 0, as some of so many do by chance."""


def section(rows: Sequence[Row]) -> list[str]:
    """The blocks below the heading."""
    if not rows:
        return missing("real")
    names = _runs(rows)
    blocks = [ABOUT, provenance(rows), _settings(rows), "### What it shows", _verdict(rows)]
    blocks += ["### Over training time", FRESH, *(f"![{name}](img/{name})" for name in drawings(rows))]
    blocks += [_table(rows, ("fresh_accuracy", *GRAMS)), _table(rows, ("rouge_l", "length_ratio", "words"))]
    blocks += [_table(rows, ("distinct_2", "repetition", "cut_share"))]
    blocks += ["### At equal compute", BESIDE, *(_beside(rows, name) for name in names[1:])] if names[1:] else []
    return [block for block in blocks if block]


def drawings(rows: Sequence[Row]) -> dict[str, str]:
    """By file name, over seconds of training; the start model is the first point of every curve."""
    made = {}
    charts = (("fresh_accuracy", "Accuracy of fresh discriminators", 1.0), ("ngram_f1_1", "1-gram F1", None),
              ("ngram_f1_4", "4-gram F1", None), ("words", "Words of a response", None))  # fmt: skip
    for key, title, top in charts:
        series, bars = {}, {}
        for name in _runs(rows):
            mine = [r for r in rows if r["run"] in (START, name) and key in r["measures"]]
            if mine:
                series[name] = [[(round(r["seconds"]), r["measures"][key]["mean"]) for r in mine]]
                bars[name] = [(round(r["seconds"]), *r["measures"][key]["interval"]) for r in mine]
        if series and key == "words":
            last = max(round(r["seconds"]) for r in rows)
            taught = _teacher(rows)["words"]["mean"]
            series["teacher"] = [[(0, taught), (last, taught)]]
        if series:
            made[f"findings-real-{key.replace('_', '-')}.svg"] = svg.lines(
                title, "seconds of training", series, top=top, bars=bars
            )
    return made


def _runs(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["run"] for row in rows if row["run"] != START))


def _teacher(rows: Sequence[Row]) -> Row:
    return next(row["teacher"] for row in rows if "teacher" in row)


def _settings(rows: Sequence[Row]) -> str:
    told, first = [], rows[0]["settings"]
    for name in _runs(rows):
        training = next(row["training"] for row in rows if row["run"] == name)
        steps = " and ".join(f"{count} of {stage}" for stage, count in training["steps"].items())
        rates = (f"learning rates {training['warmup_lr']:g} and {training['lr']:g}, discriminator "
                 f"{training['discriminator_lr']:g}, N = {training['group_size']}")  # fmt: skip
        rates = f"learning rate {training['seqkd_lr']:g}" if name == "seqkd" else rates
        told.append(
            f"`{name}`: {training['student']}, {steps} steps of {training['batch_size']} prompts, {rates}, "
            f"{training['threads'] or 'all'} threads."
        )
    fresh = first["fresh"]
    judged = "each half is judged once" if fresh["cross_fit"] else "one half is judged"
    told.append(
        f"Responses have at most {first['max_response_tokens']} tokens; those measured are drawn at temperature "
        f"{first['temperature']:g}, one for each of {rows[0]['prompts']} held-out prompts. Fresh discriminators start "
        f"from the start model and take {fresh['steps']} steps of {fresh['batch_size']} pairs at {fresh['lr']:g}; "
        f"{judged}."
    )
    return " ".join(told)


def _verdict(rows: Sequence[Row]) -> str:
    """Sentences on the latest points of equal compute, for each of the other runs."""
    names = _runs(rows)
    items = []
    for name in names[1:]:
        pair = equal_compute(rows, names[0], name)
        if pair is None:
            items.append(f"No checkpoints of {names[0]} and {name} lie within {EQUAL:.0%} of each other's seconds.")
            continue
        mine, other = pair
        items.append(
            f"At equal compute: {_at(mine)} and {_at(other)}. All sentences below are about these two checkpoints."
        )
        items += _sentences(mine, other, _teacher(rows))
    return "\n".join(f"- {item}" for item in items) or "There is one run: nothing to compare."


def equal_compute(rows: Sequence[Row], first: str, other: str) -> tuple[Row, Row] | None:
    """The latest checkpoint of the first run and the other run's beside it, None where no two trained equally long."""
    by_step = {row["step"]: row for row in rows if row["run"] == other}
    for row in reversed([row for row in rows if row["run"] == first]):
        beside = by_step[row["beside"][other]["step"]]
        if abs(row["seconds"] - beside["seconds"]) <= EQUAL * max(row["seconds"], beside["seconds"]):
            return row, beside
    return None


def _at(row: Row) -> str:
    return f"{row['run']} after {row['step']} steps ({row['seconds']:.0f} s)"


def _sentences(mine: Row, other: Row, teacher: Row) -> list[str]:
    differences = mine["beside"][other["run"]]["differences"]
    items = []
    for key, name in (("fresh_accuracy", "Fresh accuracy"), *((g, f"{g[-1]}-gram F1") for g in GRAMS)):
        if key not in differences:
            continue
        one, two = mine["measures"][key], other["measures"][key]
        apart = one["interval"][0] > two["interval"][1] or two["interval"][0] > one["interval"][1]
        word = "equal" if one["mean"] == two["mean"] else "lower" if one["mean"] < two["mean"] else "higher"
        items.append(
            f"{name}: {mine['run']} {_cell(one)}, {other['run']} {_cell(two)}; {mine['run']} is {word}, the intervals "
            f"{'do not overlap' if apart else 'overlap'}; paired difference {_cell(differences[key], signed=True)}, "
            f"{'which excludes 0' if _excludes(differences[key]) else 'which does not exclude 0'}."
        )
    words = {row["run"]: row["measures"]["words"]["mean"] for row in (mine, other)}
    lengths = " and ".join(f"{run} {count:.0f}" for run, count in words.items())
    cut = " and ".join(f"{row['measures']['cut_share']['mean']:.0%}" for row in (mine, other))
    items.append(
        f"Lengths: {lengths} words a response, the teacher {teacher['words']['mean']:.0f}; {cut} of the responses are "
        f"cut at the limit, {teacher['cut_share']['mean']:.0%} of the teacher's."
    )
    return items


def _excludes(found: Row) -> bool:
    low, high = found["interval"]
    return low > 0 or high < 0


def _cell(found: Row | None, signed: bool = False) -> str:
    if found is None:
        return "-"
    form = "+" if signed else ""
    digits = 1 if abs(found["mean"]) >= 10 else 3
    mean, low, high = (f"{value:{form}.{digits}f}" for value in (found["mean"], *found["interval"]))
    return f"{mean} [{low}, {high}]"


def _label(key: str) -> str:
    return f"{key[-1]}-gram F1" if key in GRAMS else key.replace("_", " ")


def _table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    lines = [["teacher", "-", "-", *(_cell(_teacher(rows).get(key)) for key in keys)]]
    for row in rows:
        cells = [_cell(row["measures"].get(key)) for key in keys]
        lines.append([row["run"], str(row["step"]), f"{row['seconds']:.0f}", *cells])
    if all(cell == "-" for cell in lines[0][3:]):
        del lines[0]
    return table(["run", "step", "seconds", *map(_label, keys)], lines)


def _beside(rows: Sequence[Row], other: str) -> str:
    first = _runs(rows)[0]
    keys = ("fresh_accuracy", *GRAMS, "length_ratio", "words")
    lines = []
    for row in rows:
        if row["run"] == first:
            beside = row["beside"][other]
            found = [beside["differences"].get(key) for key in keys]
            lines.append(
                [f"{row['step']} ({row['seconds']:.0f} s)", f"{beside['step']} ({beside['seconds']:.0f} s)"]
                + [_cell(each, signed=True) + (" *" if each and _excludes(each) else "") for each in found]
            )
    return table([f"{first} step", f"{other} step", *map(_label, keys)], lines)
