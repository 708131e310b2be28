"""What reward functions of other stacks have in common: labels, whole groups, and the service that scores them.

A stack hands a label along with every prompt, which its data set names. Here a label is
- text: the teacher's response to the stack's prompt;
- a number: a row of the service's data.train, from 0, which has prompt and teacher's response;
- an object, or its JSON: {"teacher_response": text} or {"row": number}, with "prompt": text or "messages": [..] where
  the stack's own prompt is already rendered, and "held_out": true where the discriminator must score without training.

GADCORE_URL is the address of the service, GADCORE_TOKEN its token.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.client import DEFAULT_URL, DiscriminatorClient, TextGroup

URL_VARIABLE = "GADCORE_URL"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """text: without end marker. finished: whether it ended by itself; False where a limit cut it."""

    text: str
    finished: bool = True


@functools.cache
def service() -> DiscriminatorClient:
    """The client of this process."""
    return DiscriminatorClient(os.environ.get(URL_VARIABLE, DEFAULT_URL))


def scores(groups: Sequence[tuple[Any, Any, Sequence[Sample]]]) -> list[list[float]]:
    """D(x, y) of the samples of every group (label, prompt, samples), in their order; by one request, by two where some
    are held out. prompt: text or messages, or None where the label has one.

    Raises UserError for a label that is none of those above, ServiceError with the service's own sentence.
    """
    given = [_text_group(*group) for group in groups]
    found: dict[int, list[float]] = {}
    for held, ask in ((False, service().score_and_update), (True, service().score)):
        places = [i for i, (_, only_scored) in enumerate(given) if only_scored == held]
        if places:
            answer = ask([given[i][0] for i in places])
            found |= dict(zip(places, answer.rewards, strict=True))
    return [found[i] for i in range(len(given))]


def is_held_out(label: Any) -> bool:
    """Whether a label says that the discriminator must not train on its prompt."""
    return bool(_known(label).get("held_out", False))


def held_out(label: Any) -> dict[str, Any]:
    """The label as one whose prompt only gets scores."""
    return {**_known(label), "held_out": True}


def _text_group(label: Any, prompt: Any, samples: Sequence[Sample]) -> tuple[TextGroup, bool]:
    known = _known(label)
    given: dict[str, Any] = {
        key: known[key] for key in ("teacher_response", "row", "prompt", "messages") if key in known
    }
    if not given.keys() & {"prompt", "messages", "row"}:
        if prompt is None:
            raise UserError(f"the label {label!r:.200} has no prompt, and neither has the stack: add one to the label")
        given["prompt" if isinstance(prompt, str) else "messages"] = prompt
    texts, finished = [sample.text for sample in samples], [sample.finished for sample in samples]
    return TextGroup(texts, finished=finished, **given), bool(known.get("held_out", False))


def _known(label: Any) -> Mapping[str, Any]:
    if isinstance(label, str):
        try:
            told = json.loads(label)
        except ValueError:
            told = None
        # Any other JSON, a number of the teacher's for example, is a text.
        label = told if isinstance(told, dict) else {"row": int(label)} if label.isdecimal() else label
    if isinstance(label, str) and label.strip():
        return {"teacher_response": label}
    if isinstance(label, int) and not isinstance(label, bool):
        return {"row": label}
    if isinstance(label, Mapping) and ("teacher_response" in label or "row" in label):
        return label
    raise UserError(
        f"a label must be the teacher's text, a row's number, or an object with teacher_response or row: {label!r:.200}"
    )


def without_end(text: str, markers: Sequence[str]) -> str:
    """The text without an end marker that a stack has decoded along with it, whichever of `markers` it is."""
    for marker in markers:
        if marker and text.rstrip().endswith(marker):
            return text.rstrip()[: -len(marker)]
    return text


def by_prompt(keys: Sequence[Hashable]) -> list[list[int]]:
    """Places of equal keys, in the order in which they come first: the groups of a batch."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


@dataclass
class _Waiting:
    samples: list[Sample] = field(default_factory=list)
    answers: list[asyncio.Future[float]] = field(default_factory=list)


class Collector:
    """Samples that a stack scores one by one, as the groups that they are of.

    send: gives the scores of a whole group. patience_s: for the siblings of a sample; a group is sent without those
    that have not come by then, since a generation may have failed.
    """

    def __init__(
        self, send: Callable[[Any, Sequence[Sample]], Awaitable[list[float]]], *, patience_s: float = 600.0
    ) -> None:
        self._send, self._patience = send, patience_s
        self._groups: dict[Hashable, _Waiting] = {}

    async def add(self, key: Hashable, count: int, given: Any, sample: Sample) -> float:
        """The sample's score, once `count` samples of this key are there. given: what send() is told of the group."""
        waiting = self._groups.setdefault(key, _Waiting())
        waiting.samples.append(sample)
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        waiting.answers.append(answer)
        if len(waiting.samples) >= count:
            await self._flush(key, given)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), self._patience)
        except TimeoutError:
            if self._groups.get(key) is waiting:
                _log.warning("a group has %d of its %d samples: scored without the rest", len(waiting.samples), count)
                await self._flush(key, given)
            return await answer

    async def _flush(self, key: Hashable, given: Any) -> None:
        waiting = self._groups.pop(key)
        try:
            found = await self._send(given, waiting.samples)
        except Exception as error:
            for answer in waiting.answers:
                answer.set_exception(error)
            return
        for answer, value in zip(waiting.answers, found, strict=True):
            answer.set_result(value)
