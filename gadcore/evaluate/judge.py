"""An LLM as the judge: it rates the response and the reference of every prompt from 1 to 10, in both orders.

    score = 100 * sum_i response_i / (sum_i response_i + sum_i reference_i)

with response_i and reference_i the means of prompt i's two ratings, one from each order: 50 where the judge finds the
model's responses as good as the references, more where it finds them better. Only prompts whose two replies could both
be read take part, so that neither order weighs more; the others are counted and named. The interval resamples prompts.

    position bias = mean of (rating of the answer shown first - rating of the one shown second), in points of the scale

over both orders, in which the quality of the two answers cancels: 0 for a judge that does not care about the order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Generic, TypeVar

import numpy as np

from gadcore.errors import UserError
from gadcore.evaluate.judge_rows import conversation
from gadcore.evaluate.responses import ResponseRow
from gadcore.measure.intervals import resampled
from gadcore.teacher.client import Tally, ask_all
from gadcore.teacher.settings import Budget, Endpoint
from gadcore.teacher.store import ChatRequest, ReplyStore

LOWEST, HIGHEST = 1, 10
SCORE, COMPARE = "score", "compare"
_PLACES = {"prompt", "a", "b"}
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)

Verdict = TypeVar("Verdict")


@dataclass(frozen=True)
class Judge:
    """Who is asked, with which words and parameters, and where the raw replies are kept."""

    endpoint: Endpoint
    parameters: dict[str, Any]
    prompts: dict[str, Template]
    store: ReplyStore
    budget: Budget
    watch: Callable[[Tally], None] = lambda tally: None


@dataclass(frozen=True)
class Judgements(Generic[Verdict]):
    """verdicts: by row, read from both orders; rows with a reply that is missing or cannot be read are left out.

    unparsable: {"row", "order", "outcome", "reply"} of replies that could not be read. unanswered: {"row", "order",
    "reason"} of requests without a reply. row counts from 0; order 0 shows the first text as A, order 1 as B.
    stopped: why not everything was asked (a signal, the budget), None where everything was.
    """

    verdicts: dict[int, tuple[Verdict, Verdict]]
    unparsable: list[dict[str, Any]]
    unanswered: list[dict[str, Any]]
    stopped: str | None

    def as_dict(self, judge: Judge) -> dict[str, Any]:
        return {
            "judge": judge.endpoint.model,
            "address": judge.endpoint.address,
            "n": len(self.verdicts),
            "unparsable": len(self.unparsable),
            "unanswered": len(self.unanswered),
            "stopped": self.stopped,
            "unparsable_replies": self.unparsable,
            "unanswered_requests": self.unanswered,
        }


def load_prompts(path: Path | None) -> dict[str, Template]:
    """The sections of a file of judge prompts (None: judge_prompts.md) by name.

    Raises UserError where a section is missing or does not have exactly the places $prompt, $a and $b.
    """
    name = str(path) if path else "judge_prompts.md"
    try:
        text = (path or files("gadcore.evaluate") / "judge_prompts.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}: give a text file with the sections # score, # compare"
        ) from None
    parts = re.split(r"^# (\w+)[ \t]*$", text, flags=re.MULTILINE)
    prompts = {title: Template(body.strip()) for title, body in zip(parts[1::2], parts[2::2], strict=True)}
    for title in (SCORE, COMPARE):
        if title not in prompts:
            raise UserError(f"{name} has no section # {title}: copy it from gadcore/evaluate/judge_prompts.md")
        if not prompts[title].is_valid() or set(prompts[title].get_identifiers()) != _PLACES:
            raise UserError(
                f"{name}, section # {title}: write $prompt, $a and $b once or more, other dollar signs as $$"
            )
    return prompts


def ask_both_orders(
    judge: Judge,
    question: str,
    texts: Sequence[tuple[str, str, str]],
    parse: Callable[[str], Verdict | None],
) -> Judgements[Verdict]:
    """Has (prompt, first, second) judged as A = first, B = second, and again the other way round.

    A stored reply that cannot be read is asked for anew.
    """
    template = judge.prompts[question]
    requests = {
        (row, order): ChatRequest(
            [{"role": "user", "content": template.substitute(prompt=prompt, a=pair[order], b=pair[1 - order])}],
            judge.parameters,
        )
        for row, (prompt, *pair) in enumerate(texts)
        for order in (0, 1)
    }
    tally = ask_all(
        judge.endpoint, list(requests.values()), judge.store, budget=judge.budget, watch=judge.watch,
        usable=lambda reply: parse(reply.text) is not None,
    )  # fmt: skip
    read: dict[tuple[int, int], Verdict] = {}
    unparsable, unanswered = [], []
    for (row, order), request in requests.items():
        key = judge.store.key(request, judge.endpoint.model)
        reply = judge.store.get(key)
        if reply is None:
            reason = tally.failed.get(key) or tally.stopped
            unanswered.append({"row": row, "order": order, "reason": reason})
        elif (verdict := parse(reply.text)) is None:
            text = reply.refusal or reply.text
            unparsable.append({"row": row, "order": order, "outcome": reply.outcome, "reply": text})
        else:
            read[row, order] = verdict
    both = {row: (read[row, 0], read[row, 1]) for row in range(len(texts)) if (row, 0) in read and (row, 1) in read}
    return Judgements(both, unparsable, unanswered, tally.stopped)


def first_line(reply: str) -> str:
    """The first line of a reply that is not empty, without the <think> part of a reasoning model."""
    return next((line.strip() for line in _THOUGHT.sub("", reply).splitlines() if line.strip()), "")


def parse_ratings(reply: str) -> tuple[float, float] | None:
    """(A's, B's) rating from 1 to 10 out of a reply's first line; None where it does not hold exactly two.

    Words, marks and "/10" around the two numbers do not matter.
    """
    line = re.sub(rf"/\s*{HIGHEST}\b", "", first_line(reply))
    ratings = [float(number) for number in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.]*\d)", line)]
    if len(ratings) != 2 or not all(LOWEST <= rating <= HIGHEST for rating in ratings):
        return None
    return ratings[0], ratings[1]


def judge_score(judge: Judge, rows: Sequence[ResponseRow], *, seed: int = 0) -> dict[str, Any]:
    """The score of one model on one set as JSON holds it; score and interval are None where no prompt could be read.

    prompts: [{"row", "response": [order 0, order 1], "reference": [order 0, order 1]}, ..], the ratings themselves.
    """
    texts = [(conversation(row), row.response, row.reference) for row in rows]
    judged = ask_both_orders(judge, SCORE, texts, parse_ratings)
    # [prompts, orders, (A, B)]; the response is A in order 0 and B in order 1.
    ratings = np.array(list(judged.verdicts.values()), dtype=np.float64).reshape(-1, 2, 2)
    response, reference = (np.stack([ratings[:, 0, at], ratings[:, 1, 1 - at]], 1) for at in (0, 1))
    result: dict[str, Any] = {"measure": "judge score", "score": None, "interval": None}
    if len(ratings):
        score, interval = share_of_total(response.mean(1), reference.mean(1), seed=seed)
        better = np.sign(response - reference)
        result |= {
            "score": score,
            "interval": interval,
            "mean_response": float(response.mean()),
            "mean_reference": float(reference.mean()),
            "position_bias": float((ratings[..., 0] - ratings[..., 1]).mean()),
            "consistency": float((better[:, 0] == better[:, 1]).mean()),
        }
    prompts = [
        {"row": row, "response": mine.tolist(), "reference": other.tolist()}
        for row, mine, other in zip(judged.verdicts, response, reference, strict=True)
    ]
    return result | judged.as_dict(judge) | {"prompts": prompts}


def share_of_total(
    part: np.ndarray, rest: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, list[float]]:
    """100 * sum(part) / (sum(part) + sum(rest)) of float [prompts] each, and its percentile bootstrap interval."""

    def share(picked: np.ndarray) -> float:
        mine = part[picked].sum()
        return float(100 * mine / (mine + rest[picked].sum()))

    interval = resampled(share, len(part), seed=seed, resamples=resamples)
    return share(np.arange(len(part))), list(interval)
