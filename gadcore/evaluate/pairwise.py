"""Win / Tie / Loss of model a against model b: an LLM judge chooses the better response per prompt, in both orders.

A prompt is a win (loss) where the judge chose a (b) in both orders, else a tie. Beside that:

    net          100 * (wins - losses) / prompts, in points, with a bootstrap interval over prompts
    consistency  share of prompts for which both orders led to the same verdict
    position bias  share of verdicts for the answer shown first - share for the one shown second; both orders hold the
                 same answers, so a judge that does not care about the order has 0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from gadcore.evaluate.judge import COMPARE, Judge, ask_both_orders, first_line
from gadcore.evaluate.judge_rows import conversation
from gadcore.evaluate.responses import ResponseRow
from gadcore.measure.intervals import bootstrap

OUTCOMES = ("win", "tie", "loss")
WIN, TIE, LOSS = range(3)
_CHOICE = re.compile(r"\W*(?:(?:verdict|winner|better|best|answer|response|is)\b\W*)*(a|b|tie)\W*", re.IGNORECASE)


def parse_choice(reply: str) -> str | None:
    """ "A", "B" or "TIE" out of a reply's first line, which must hold nothing else but words like "answer"."""
    found = _CHOICE.fullmatch(first_line(reply))
    return found[1].upper() if found else None


def outcome(verdicts: tuple[str, str]) -> int:
    """WIN, TIE or LOSS of the response that was A in the first order and B in the second."""
    return {("A", "B"): WIN, ("B", "A"): LOSS}.get(verdicts, TIE)


def compare(judge: Judge, a: Sequence[ResponseRow], b: Sequence[ResponseRow], *, seed: int = 0) -> dict[str, Any]:
    """The figures of two models whose rows i answer the same prompt, as JSON holds them; no figures without verdicts.

    prompts: [{"row", "outcome", "verdicts": [order 0, order 1]}, ..]; a's response is A in order 0.
    """
    texts = [(conversation(one), one.response, other.response) for one, other in zip(a, b, strict=True)]
    judged = ask_both_orders(judge, COMPARE, texts, parse_choice)
    prompts = [
        {"row": row, "outcome": OUTCOMES[outcome(verdicts)], "verdicts": list(verdicts)}
        for row, verdicts in judged.verdicts.items()
    ]
    result: dict[str, Any] = {"measure": "pairwise preference"}
    if prompts:
        said = [verdict for verdicts in judged.verdicts.values() for verdict in verdicts]
        same = [v in {("A", "B"), ("B", "A"), ("TIE", "TIE")} for v in judged.verdicts.values()]
        result |= summarise([one_hot(outcome(verdicts)) for verdicts in judged.verdicts.values()], seed=seed)
        result |= {
            "consistency": fmean(same),
            "position_bias": (said.count("A") - said.count("B")) / len(said),
        }
    return result | judged.as_dict(judge) | {"prompts": prompts}


def one_hot(outcome: int) -> list[float]:
    """The (win, tie, loss) shares of a single verdict."""
    return [float(outcome == index) for index in range(len(OUTCOMES))]


def summarise(shares: Sequence[Sequence[float]], *, seed: int = 0) -> dict[str, Any]:
    """The means of (win, tie, loss) over prompts, whose shares each sum to 1, and net with its interval, in points."""
    means = {name: fmean(column) for name, column in zip(OUTCOMES, zip(*shares, strict=True), strict=True)}
    net = bootstrap([100 * (prompt[WIN] - prompt[LOSS]) for prompt in shares], seed=seed)
    return means | {"net": net.mean, "interval": [net.low, net.high], "n": net.n}
