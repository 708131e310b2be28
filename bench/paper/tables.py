"""docs/measured/findings.md and its drawings, wholly generated from paper.json and real.json in bench/results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import record
from bench.paper import real_text, svg
from bench.paper.gates import GATES, curve, outcomes, verdict
from bench.tables import Read, Row, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "findings.md"
IMAGES = record.DOCUMENTS / "img"

HEADER = """# The paper's findings, small

Generated from `bench/results/paper.json` and `real.json` by `python -m bench tables`: do not edit. The toys are made by
`python -m bench paper [mixture|language|fresh] [--seeds N]`, what is on real text by `python -m bench real`.

The toys are trained by `gadcore.algorithm.warmup()`, `gad()` and `seqkd()` through gadcore's own Trainer, Student and
Discriminator; only the models, the teachers and the sampler are toys. Each arm differs from GAD by one setting
(`algorithm.freeze_discriminator`, `student_warmup`, `discriminator_warmup`), the oracle by what stands in D's place:
log p - log q, the exact optimum of the Bradley-Terry loss. Figures are means over seeds with a 95 %
t-interval; a verdict counts the seeds in which the sentence held: reproduced is what held in 80 % of them or more.
Seconds are CPU time on one thread."""

MIXTURE = """One Gaussian over 128 bins learns from 4096 samples of three Gaussians. `skewed`: modes at -.5, .1 and .7
with weights .7, .2, .1 and sd .1. This geometry was chosen: the Gaussian of maximal likelihood is no local optimum of
the reverse KL there, so a student that follows it leaves. KL in nats; on mode: mass within 2.5 sd of a mode."""

SYMMETRIC = """`symmetric`: modes at -.3, 0 and .3 with equal weights. SeqKD's Gaussian lies at a local optimum of the
reverse KL here, so the student is not expected to leave it, not even with the oracle: mode seeking should *not* appear.
What GAD does is not decided by its objective alone, but also by where it starts."""

LANGUAGE = """A prompt is a count and three letters, a response as many segments `opener letter letter letter`. The
teacher chooses a hidden style once a response and takes every opener from it; the student (a two-layer Llama that sees
the prompt, its last token and the position) cannot remember the style, so by likelihood it can only mix them: the
optimum of SeqKD is valid in .298 of its samples. D is a two-layer Llama that reads the whole response. valid: share of
samples that the teacher could have said, exactly; log p: the teacher's of a sample. Out of domain: first letters that
no training prompt had."""

PARITY = """`parity`: each opener is one of two words, and the second one comes an even number of times in every
response. Models, settings and steps are those above. A student that keeps to one word is always right, and the oracle
shows whether it can be taught that; a D has to find the parity of the openers first, and where it does not, its
rewards say nothing about what is wrong."""

FRESH = """At every point new discriminators learn for 100 steps on half of 200 held-out pairs and are asked about the
other half, and the other way round. .5: they cannot tell. Healthy is GAD, hacked is GAD with a frozen D. A student
that keeps to one style can be told from a teacher with two, so .5 is not where a good run ends."""

TUNED = """By hand, starting from the values of a first exploration: the student's learning rate and the steps of the
GAD stage. Mixture: at a higher rate GAD stays at the saddle before the one-mode optimum in some seeds, or comes back to
it, so it takes small and many steps. Language: at 1e-4, with which seeds 0 to 2 were run, GAD was not done after 500
steps in every seed, and neither was the oracle (.88 and .91 valid in the slowest seed): both wait at the saddle where
the styles are mixed, how long is chance, and a frozen D has not been hacked by then. So it is 2e-4 now, chosen on seed
100, which is not reported. The discriminator's rates, the gradient clip and the warmups' rates were set once.
All arms share `SETTINGS` of `bench/paper/mixture_runs.py` and `bench/paper/language_runs.py`; SeqKD runs to its plateau
(its curve is in the results). All else is gadcore's default, but temperature 1 and, for the language, no KL term."""
# Of rows that do not say it.
FIRST_RATE = 1e-4

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def estimate(values: Sequence[float], digits: int = 2) -> str:
    """mean ± half the 95 % t-interval over seeds; the mean alone for one seed."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    half = _T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def files() -> dict[Path, str]:
    """The document, and the drawings that it shows."""
    drawn = drawings(rows_of("paper")) | real_text.drawings(rows_of("real"))
    return {DOCUMENT: document(), **{IMAGES / name: drawing for name, drawing in drawn.items()}}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows, real = read("paper"), ["## On real text", *real_text.section(read("real"))]
    if not rows:
        return "\n\n".join([HEADER, *missing("paper"), *real]) + "\n"
    blocks = [HEADER, provenance(rows), "## Verdicts", _verdicts(rows), "## Gaussian mixture", MIXTURE]
    blocks += [_mixture(rows, "skewed"), SYMMETRIC, _mixture(rows, "symmetric")]
    blocks += ["## Tiny language", LANGUAGE, *_language(rows, "styles")]
    blocks += ["### A language in which GAD does not win", PARITY, *_language(rows, "parity")]
    blocks += ["## Fresh discriminators", FRESH, _fresh(rows), *real, "## What was tuned", TUNED]
    return "\n\n".join(block for block in blocks if block) + "\n"


def drawings(rows: Sequence[Row]) -> dict[str, str]:
    """By file name; seeds are curves of one colour, densities are of the lowest seed."""
    made = {}
    for geometry in _values(rows, "geometry"):
        mine = [r for r in rows if r.get("geometry") == geometry]
        first = min(r["seed"] for r in mine)
        series = {"teacher": [_density(teacher_density(geometry))]}
        series |= {r["arm"]: [_density(r["density"])] for r in mine if r["seed"] == first and r["arm"] != "frozen"}
        made[f"findings-{geometry}.svg"] = svg.lines(f"Densities, {geometry}", "x", series)
    for language in _values(rows, "language"):
        mine = [r for r in rows if r.get("language") == language]
        series = {
            arm: [[(p["step"], p["valid"]) for p in r["curve"] if p["stage"] == "gad"] for r in mine if r["arm"] == arm]
            for arm in ("gad", "oracle", "frozen")
            if any(r["arm"] == arm for r in mine)
        }
        if series:
            made[f"findings-{language}.svg"] = svg.lines("Valid samples in the GAD stage", "step", series, top=1.0)
    followed = {
        name: [
            [(p["step"], p["accuracy"]) for p in r["fresh"]]
            for r in rows
            if r["arm"] == arm and r.get("language") == "styles"
        ]
        for name, arm in (("healthy", "gad"), ("hacked", "frozen"))
    }
    if all(followed.values()):
        made["findings-fresh.svg"] = svg.lines("Accuracy of fresh discriminators", "step", followed, top=1.0)
    return made


def teacher_density(geometry: str) -> list[float]:
    from bench.paper.mixture import TEACHERS

    return next(t for t in TEACHERS if t.name == geometry).probabilities.tolist()


def _density(values: Sequence[float]) -> list[svg.Point]:
    return [(-1 + 2 * i / (len(values) - 1), v) for i, v in enumerate(values)]


def _values(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows if key in row))


def _verdicts(rows: Sequence[Row]) -> str:
    lines = [[g.experiment, g.where, g.says, verdict(outcomes(g, rows))] for g in GATES]
    return table(["experiment", "where", "finding", "verdict"], lines)


def _by_arm(rows: Sequence[Row], key: str, value: str) -> dict[str, list[Row]]:
    mine = [row for row in rows if row.get(key) == value]
    return {arm: [row for row in mine if row["arm"] == arm] for arm in _values(mine, "arm")}


def _mixture(rows: Sequence[Row], geometry: str) -> str:
    header = ["arm", "seeds", "forward KL", "reverse KL", "on mode", "modes kept", "seconds"]
    lines = [
        [arm, str(len(mine))]
        + [estimate([r[k] for r in mine]) for k in ("forward_kl", "reverse_kl", "on_mode")]
        + [", ".join(str(r["modes"]) for r in mine), f"{statistics.fmean(r['seconds'] for r in mine):.0f}"]
        for arm, mine in _by_arm(rows, "geometry", geometry).items()
    ]
    return f"![densities](img/findings-{geometry}.svg)\n\n{table(header, lines)}" if lines else ""


def _language(rows: Sequence[Row], language: str) -> list[str]:
    arms = _by_arm(rows, "language", language)
    if not arms:
        return ["Not run."]
    rates = sorted({r.get("student_lr", FIRST_RATE) for mine in arms.values() for r in mine})
    lines, more = [], []
    for arm, mine in arms.items():
        here, there = [r["in_domain"] for r in mine], [r["out_of_domain"] for r in mine]
        peak = [max(curve(r, "valid")) for r in mine if curve(r, "valid")]
        lines.append(
            [arm, str(len(mine)), estimate([m["valid"] for m in here]), estimate([m["valid"] for m in there])]
            + [estimate(peak) if peak else "-"]
            + [estimate([m[k] for m in here], 1) for k in ("log_p", "reverse_kl", "forward_kl")]
            + [f"{statistics.fmean(r['seconds'] for r in mine):.0f}"]
        )
        more.append(
            [arm, estimate([m["log_p"] for m in there], 1)]
            + [estimate([m["ngram_f1"][n] for m in here]) for n in "1234"]
            + [estimate([m["length"] for m in here], 1), estimate([m["length"] for m in there], 1)]
        )
    header = [
        "arm",
        "seeds",
        "valid",
        "valid out of domain",
        "peak in GAD",
        "log p",
        "reverse KL",
        "forward KL",
        "seconds",
    ]
    grams = ["arm", "log p out of domain", *(f"{n}-gram F1" for n in "1234"), "length", "length out of domain"]
    teacher = statistics.fmean(r["in_domain"]["teacher_length"] for mine in arms.values() for r in mine)
    return [
        f"![valid samples](img/findings-{language}.svg)",
        table(header, lines),
        table(grams, more),
        f"The teacher's responses have {teacher:.1f} tokens. The student's rate is "
        f"{' and '.join(f'{rate:g}' for rate in rates)}.",
    ]


def _fresh(rows: Sequence[Row]) -> str:
    lines = []
    for name, arm in (("healthy", "gad"), ("hacked", "frozen")):
        mine = [r["fresh"] for r in rows if r["arm"] == arm and r.get("language") == "styles"]
        for points in zip(*mine, strict=True) if mine else ():
            lines.append(
                [name, str(points[0]["step"]), estimate([p["accuracy"] for p in points])]
                + [estimate([p["valid"] for p in points])]
            )
    if not lines:
        return "Not run."
    return "![fresh](img/findings-fresh.svg)\n\n" + table(["run", "step", "fresh accuracy", "valid"], lines)


def check(rows: Sequence[Row]) -> str:
    """The verdicts as JSON, for a glance at a terminal."""
    return json.dumps({g.says: verdict(outcomes(g, rows)) for g in GATES}, indent=1)
