"""ask_all(): many requests to one endpoint, each answered once, every answer on disk before it counts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from gadcore.errors import UserError
from gadcore.teacher.limits import MinuteLimit, Purse, Taken, cost, most
from gadcore.teacher.reply import Reply, Unusable, refused
from gadcore.teacher.secret import Secret
from gadcore.teacher.settings import OPENAI, Budget, Endpoint
from gadcore.teacher.store import ChatRequest, ReplyStore, Spent
from gadcore.teacher.transport import Transport
from gadcore.text import say

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 8.0  # before a request is tried again; twice as long each time
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Tally:
    """How far ask_all() is; what it returns at the end.

    asked_for: different requests. kept: of these, answered before. answered, failed ({key: reason}): in this run.
    sent: HTTP requests, retries included. spent, cost: of the whole store. stopped: why not all were asked.
    odd: {what was odd about replies: in how many}, in this run.
    """

    asked_for: int
    kept: int
    spent: Spent
    cost: float | None
    answered: int = 0
    sent: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    odd: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None

    @property
    def unasked(self) -> int:
        return self.asked_for - self.kept - self.answered - len(self.failed)

    @property
    def complete(self) -> bool:
        return self.asked_for == self.kept + self.answered


def ask_all(
    endpoint: Endpoint,
    requests: Sequence[ChatRequest],
    store: ReplyStore,
    *,
    budget: Budget | None = None,
    watch: Callable[[Tally], None] = lambda tally: None,
    usable: Callable[[Reply], bool] = lambda reply: True,
) -> Tally:
    """Has every request answered that the store does not hold yet, in their order, endpoint.concurrency at a time.

    usable: a stored reply for which it is false is asked for anew; the newer one then takes its place.
    watch: called at the start and after every request. SIGTERM or Ctrl-C lets the requests in flight finish and
    returns; the second one raises KeyboardInterrupt. Requests that failed are in the tally and in the store, with the
    reason, and are asked again by the next call.

    Raises UserError where no model is named, where the key is missing, and where the store cannot be written.
    """
    if not endpoint.model:
        raise UserError("no model is named: set endpoint.model to its name on the server, --endpoint.model NAME")
    different = {store.key(request, endpoint.model): request for request in requests}
    pending = {key: request for key, request in different.items() if (r := store.get(key)) is None or not usable(r)}
    tally = Tally(len(different), len(different) - len(pending), store.spent, cost(endpoint, store.spent))
    watch(tally)
    if pending:
        with _stop_signals(tally):
            asyncio.run(_Run(endpoint, store, budget or Budget(), tally, watch).ask(pending))
    return tally


def _api_key(endpoint: Endpoint) -> str:
    key = os.environ.get(endpoint.api_key_variable, "").strip()
    if not key and endpoint.host == OPENAI:
        raise UserError(
            f"the environment variable {endpoint.api_key_variable} is not set: put your key into it, or name another "
            "one by endpoint.api_key_variable"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the key in the environment variable {endpoint.api_key_variable} holds characters no key has")
    return key


def exit_code(stopped: str | None) -> int:
    """Of a command that could not ask for everything: 128 + signal where one stopped it, else 1. stopped: of Tally."""
    numbers = {number.name: number for number in STOP_SIGNALS}
    return 128 + numbers[stopped] if stopped in numbers else 1


@contextmanager
def _stop_signals(tally: Tally) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        if tally.stopped:
            raise KeyboardInterrupt
        tally.stopped = signal.Signals(number).name
        say("gadcore: waiting for the requests in flight; Ctrl-C again stops at once", sys.stderr)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """One call of ask_all()."""

    def __init__(
        self, endpoint: Endpoint, store: ReplyStore, budget: Budget, tally: Tally, watch: Callable[[Tally], None]
    ) -> None:
        self._endpoint, self._store, self._tally, self._watch = endpoint, store, tally, watch
        self._secret = Secret(_api_key(endpoint))
        self._purse = Purse(budget, endpoint)
        self._tokens = MinuteLimit(endpoint.tokens_per_minute)
        self._transport = Transport(endpoint, self._secret)
        self._failed_in_a_row = 0
        self._error: BaseException | None = None

    async def ask(self, pending: dict[str, ChatRequest]) -> None:
        running: set[asyncio.Task[None]] = set()
        async with self._transport:
            for key, request in pending.items():
                limit = most(request)
                # Those in flight may turn out cheaper than they might be: the budget is spent when none is left.
                while running and (len(running) >= self._endpoint.concurrency or self._exceeded_by(limit)):
                    running = await self._until_one_ends(running)
                while not self._tally.stopped and (wait := self._tokens.delay(limit.tokens)):
                    await asyncio.sleep(min(wait, 1.0))
                if not self._tally.stopped and (setting := self._exceeded_by(limit)):
                    self._tally.stopped = f"the budget is spent: {setting} leaves no room for the next request"
                if self._tally.stopped:
                    break
                self._purse.reserve(limit)
                running.add(asyncio.create_task(self._one(key, request, limit, self._tokens.take(limit.tokens))))
            while running:
                running = await self._until_one_ends(running)
        if self._error is not None:
            raise self._error

    async def _until_one_ends(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """What fails for a reason of ours, as a full disk, ends the asking; those in flight are still let finish."""
        done, left = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if (error := task.exception()) is not None:
                self._error = self._error or error
                self._tally.stopped = self._tally.stopped or str(error)
        return left

    def _exceeded_by(self, amount: Spent) -> str | None:
        return self._purse.exceeded_by(amount, self._store.spent)

    async def _one(self, key: str, request: ChatRequest, limit: Spent, taken: Taken) -> None:
        began = time.monotonic()
        answer = await self._answer(request)
        tally = self._tally
        if isinstance(answer, Reply):
            spent = Spent.of(request, answer.usage, answer.text)
            self._store.add(request, self._endpoint.model, answer, spent, time.monotonic() - began)
            taken.amount = spent.tokens
            tally.odd.update(answer.told)
            if spent.uncounted and {"prompt_tokens", "completion_tokens"} <= (answer.usage or {}).keys():
                tally.odd["usage counts fewer tokens than so much text can have: estimated"] += 1
            tally.answered += 1
            self._failed_in_a_row = 0
        else:
            tally.failed[key] = answer
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self._endpoint.give_up_after and not tally.stopped:
                tally.stopped = f"{self._failed_in_a_row} requests in a row failed (endpoint.give_up_after): {answer}"
        self._purse.release(limit)
        tally.sent, tally.spent, tally.cost = (
            self._transport.sent,
            self._store.spent,
            cost(self._endpoint, self._store.spent),
        )
        self._watch(tally)

    async def _answer(self, request: ChatRequest) -> Reply | str:
        """The reply, or the reason why there is none; every failure is in the store, with what it cost."""
        end = time.monotonic() + self._endpoint.total_timeout
        body = {**request.parameters, "model": self._endpoint.model, "messages": [dict(m) for m in request.messages]}
        for attempt in range(self._endpoint.max_retries + 1):
            try:
                answer = await self._transport.post(body, min(self._endpoint.timeout, end - time.monotonic()))
                if answer.status == 200:
                    return Reply.parse(answer.body, self._secret)
                raise refused(answer.status, answer.body, self._secret, answer.wait_s)
            except Unusable as error:
                if error.filtered:
                    return Reply("", "content_filter")  # the prompt was filtered: an answer that will not change
                reason = str(error)
                if reason.startswith("HTTP 401"):
                    reason += f" (the key is read from the environment variable {self._endpoint.api_key_variable})"
                if error.hopeless and not self._tally.stopped:
                    self._tally.stopped = reason
                spent = Spent.of(request, error.usage) if error.billed else Spent()
                self._store.add_failure(request, self._endpoint.model, reason, spent)
                wait = error.wait_s or min(FIRST_DELAY_S * 2**attempt, LONGEST_DELAY_S)
                if error.lasting or self._tally.stopped or attempt == self._endpoint.max_retries:
                    return reason
                if self._exceeded_by(Spent()):
                    return f"{reason}; the budget leaves no room to ask again"
                if time.monotonic() + wait >= end:
                    return f"{reason}; endpoint.total_timeout leaves no time to ask again"
            again = time.monotonic() + wait
            while (left := again - time.monotonic()) > 0 and not self._tally.stopped:
                await asyncio.sleep(min(left, 0.5))
            if self._tally.stopped:
                return reason
        raise AssertionError("the last attempt returns")
