"""Counts what people chose on a blind sheet (gadcore.evaluate.human): wins, ties and losses of model a, and agreement.

Per rater: over the prompts that this rater answered. In all: a prompt counts once, its win, tie and loss are the shares
of its raters, and the interval resamples prompts, so that the raters of a prompt stay together.

Agreement, over prompts that several raters answered: `percent` is the share of pairs of raters who chose the same.
kappa = (P - P_e) / (1 - P_e) corrects it for chance: Cohen's for two raters (P_e from each rater's own shares of win,
tie and loss), Fleiss' for more (P_e from the shares of all), over the prompts that every rater answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from gadcore.errors import UserError
from gadcore.evaluate.pairwise import LOSS, OUTCOMES, TIE, WIN, summarise
from gadcore.record.reading import fitting, read_json
from gadcore.text import markdown as escaped

CHOICES = ("left", "right", "tie")
LONGEST_S = 10.0**7

_ADVICE = "give the key, then the files that the sheet exported"


@dataclass(frozen=True)
class _Pair:
    """Which model stood on the left."""

    left: Literal["a", "b"]


@dataclass(frozen=True)
class _Key:
    """What a tally reads of a key."""

    sheet: str
    a: str
    b: str
    pairs: dict[str, _Pair]
    set: str | None = None


_KEY = TypeAdapter(_Key)


@dataclass(frozen=True)
class Answers:
    """One rater's choices: outcome (index into OUTCOMES, for model a) by pair id.

    left: the share of the left side among choices that are no tie, None where all are. seconds: the median a prompt.
    """

    rater: str
    outcomes: dict[str, int]
    left: float | None
    seconds: float


def tally(key_path: Path, answer_paths: Sequence[Path]) -> dict[str, Any]:
    """The figures of all raters as JSON holds them.

    Raises UserError where a file is broken or belongs to another sheet, or where two files are of the same rater.
    """
    key = read_json(key_path, _ADVICE)
    for field in ("sheet", "a", "b", "pairs"):
        if field not in key:
            raise UserError(f'{key_path} has no "{field}": give the key that was written with the sheet')
    fitting(_KEY, key, key_path, "give the key as it was written with the sheet")
    found: dict[str, Path] = {}
    everyone = []
    for path in answer_paths:
        answers = _answers(path, key)
        if answers.rater in found:
            raise UserError(
                f"{path} and {found[answers.rater]} are both of rater {answers.rater!r}: give the newer one only, or "
                "change the name in one of them where these are two people"
            )
        found[answers.rater] = path
        everyone.append(answers)
    pairs: list[str] = list(key["pairs"])
    rated = [pair for pair in pairs if any(pair in one.outcomes for one in everyone)]
    weights = [_shares([one.outcomes[pair] for one in everyone if pair in one.outcomes]) for pair in rated]
    return {
        "measure": "human preference",
        "set": key.get("set"),
        "a": key["a"],
        "b": key["b"],
        "pairs": len(pairs),
        "all": summarise(weights) if weights else None,
        "raters": [
            {"rater": one.rater, "missing": len(pairs) - len(one.outcomes), "left_share": one.left,
             "median_seconds": one.seconds}
            | summarise([_shares([outcome]) for outcome in one.outcomes.values()])
            for one in everyone
        ],
        "unrated": len(pairs) - len(rated),
        "agreement": agreement([one.outcomes for one in everyone]),
    }  # fmt: skip


def agreement(raters: Sequence[Mapping[str, int]]) -> dict[str, Any] | None:
    """Agreement of raters, each {pair id: outcome}; None for a single one. See the module's docstring.

    kappa is None where no prompt was answered by all, or where everybody chose the same throughout (0 / 0).
    """
    if len(raters) < 2:
        return None
    same = [one[pair] == two[pair] for one, two in combinations(raters, 2) for pair in one if pair in two]
    common = [pair for pair in raters[0] if all(pair in rater for rater in raters)]
    result: dict[str, Any] = {"percent": 100 * fmean(same) if same else None, "compared": len(same),
                              "prompts_by_all": len(common), "statistic": "Cohen" if len(raters) == 2 else "Fleiss",
                              "kappa": None}  # fmt: skip
    if common:
        # [raters, prompts, outcomes]
        chosen = np.eye(len(OUTCOMES))[[[rater[pair] for pair in common] for rater in raters]]
        count = len(raters)
        together = chosen.sum(0)
        observed = float(((together * (together - 1)).sum(1) / (count * (count - 1))).mean())
        own = chosen.mean(1)
        chance = float((own[0] * own[1]).sum() if count == 2 else (own.mean(0) ** 2).sum())
        if chance < 1:
            result["kappa"] = (observed - chance) / (1 - chance)
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """The tally as a Markdown table, with sentences on what is missing and on agreement."""
    lines = [
        f"{escaped(result['a'])} against {escaped(result['b'])} on {escaped(str(result['set']))}, judged blind by "
        f"{len(result['raters'])} "
        f"({result['pairs']} prompts)",
        "",
        "| rater | win | tie | loss | wins - losses, points | prompts | missing | left side | seconds a prompt |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["raters"]:
        left = "–" if row["left_share"] is None else f"{100 * row['left_share']:.0f} %"
        lines.append(
            f"| {escaped(row['rater'])} | {_figures(row)} | {row['missing']} | {left} | {row['median_seconds']:.0f} |"
        )
    if len(result["raters"]) > 1:
        lines.append(f"| all | {_figures(result['all'])} | {result['unrated']} | | |")
    lines += ["", "Left side: its share of the choices that are no tie. Seconds: the median.", ""]
    for row in result["raters"]:
        if row["missing"]:
            lines.append(
                f"The sheet of {escaped(row['rater'])} is incomplete: {row['missing']} prompts have no answer."
            )
    agreed = result["agreement"]
    if agreed and agreed["percent"] is not None:
        kappa = "undefined" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}"
        lines.append(
            f"Agreement: {agreed['percent']:.0f} % of {agreed['compared']} comparisons; {agreed['statistic']}'s kappa "
            f"{kappa} over the {agreed['prompts_by_all']} prompts that every rater answered."
        )
    elif agreed:
        lines.append("There is no measure of agreement: no prompt was answered by more than one rater.")
    return "\n".join(lines).rstrip() + "\n"


def _figures(row: Mapping[str, Any]) -> str:
    shares = " | ".join(f"{100 * row[name]:.0f} %" for name in OUTCOMES)
    low, high = row["interval"]
    return f"{shares} | {row['net']:+.0f} [{low:+.0f}, {high:+.0f}] | {row['n']}"


def _shares(outcomes: Sequence[int]) -> list[float]:
    return [outcomes.count(outcome) / len(outcomes) for outcome in range(len(OUTCOMES))]


def _answers(path: Path, key: Mapping[str, Any]) -> Answers:
    content = read_json(path, _ADVICE)
    if content.get("sheet") != key["sheet"]:
        raise UserError(
            f"{path} answers sheet {str(content.get('sheet'))[:40]}, the key is of sheet {key['sheet']}: give the "
            "key of that sheet"
        )
    rater, rows = content.get("rater"), content.get("answers")
    if not isinstance(rater, str) or not rater:
        raise UserError(f'{path} has no "rater": write the name of the person there')
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no answers: leave it out, or export the sheet again")
    outcomes: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        pair, choice = (str(row.get(name))[:40] if isinstance(row, dict) else "" for name in ("pair", "choice"))
        if pair not in key["pairs"] or choice not in CHOICES or pair in outcomes:
            raise UserError(f"{path}, answer {number} ({pair}: {choice}) is unknown or given twice: export it again")
        seconds = row.get("seconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_S:
            raise UserError(
                f"{path}, answer {number} ({pair}): seconds = {str(seconds)[:40]} is no time that a person took: "
                "export it again, or leave seconds out there"
            )
        a_side = "left" if key["pairs"][pair]["left"] == "a" else "right"
        outcomes[pair] = TIE if choice == "tie" else WIN if choice == a_side else LOSS
    sides = [row["choice"] == "left" for row in rows if row["choice"] != "tie"]
    return Answers(
        rater,
        outcomes,
        left=fmean(sides) if sides else None,
        seconds=median(float(row.get("seconds", 0)) for row in rows),
    )
