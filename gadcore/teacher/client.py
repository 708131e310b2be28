"""ask_all(): many requests to one endpoint, each answered once, every answer on disk before it counts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gadcore.errors import UserError
from gadcore.teacher.limits import MinuteLimit, Purse, Taken, cost, most
from gadcore.teacher.settings import Budget, Endpoint
from gadcore.teacher.store import ChatRequest, Reply, ReplyStore, Spent, Unusable

# Wrong for one request, wrong for all: no key or a wrong one, no such model or address.
_HOPELESS = (openai.AuthenticationError, openai.NotFoundError)

FIRST_DELAY_S = 0.5  # before an unusable answer is asked for again; twice as long each time, up to 8 s
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Tally:
    """How far ask_all() is; what it returns at the end.

    asked_for: different requests. kept: of these, answered before. answered, failed ({key: reason}): in this run.
    sent: HTTP requests, retries included. spent, cost: of the whole store. stopped: why not all were asked.
    """

    asked_for: int
    kept: int
    spent: Spent
    cost: float | None
    answered: int = 0
    sent: int = 0
    failed: dict[str, str] = field(default_factory=dict)
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
) -> Tally:
    """Has every request answered that the store does not hold yet, in their order, endpoint.concurrency at a time.

    watch: called at the start and after every request. SIGTERM or Ctrl-C lets the requests in flight finish and
    returns; the second one raises KeyboardInterrupt. Requests that failed are in the tally and in the store, with the
    reason, and are asked again by the next call.

    Raises UserError where no model is named, where the key is missing, and where the store cannot be written.
    """
    if not endpoint.model:
        raise UserError("no model is named: set endpoint.model to its name on the server, --endpoint.model NAME")
    different = {request.key(endpoint.model): request for request in requests}
    pending = {key: request for key, request in different.items() if key not in store}
    tally = Tally(len(different), len(different) - len(pending), store.spent, cost(endpoint, store.spent))
    watch(tally)
    if pending:
        with _stop_signals(tally):
            asyncio.run(_Run(endpoint, store, budget or Budget(), tally, watch).ask(pending))
    return tally


def _api_key(endpoint: Endpoint) -> str:
    key = os.environ.get(endpoint.api_key_variable, "").strip()
    if not key and endpoint.host == "api.openai.com":
        raise UserError(
            f"the environment variable {endpoint.api_key_variable} is not set: put your key into it, or name another "
            "one by endpoint.api_key_variable"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the key in the environment variable {endpoint.api_key_variable} holds characters no key has")
    return key or "none"  # the client insists on one; a server without keys ignores it


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
        print("gadcore: waiting for the requests in flight; Ctrl-C again stops at once", file=sys.stderr)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _PacedClient(DefaultAsyncHttpxClient):
    """Every HTTP request, retries included, waits for its place in the minute and must be answered in time.

    The time is for the whole answer: httpx2's own limits start again with every byte that arrives.
    """

    def __init__(self, limit: MinuteLimit, timeout: float) -> None:
        super().__init__(timeout=None)
        self._limit, self._seconds, self.sent = limit, timeout, 0

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        while wait := self._limit.delay():
            await asyncio.sleep(wait)
        self._limit.take()
        self.sent += 1
        try:
            async with asyncio.timeout(self._seconds):
                return await super().send(request, **options)
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole answer in {self._seconds:g} s", request=request) from None


class _Run:
    """One call of ask_all()."""

    def __init__(
        self, endpoint: Endpoint, store: ReplyStore, budget: Budget, tally: Tally, watch: Callable[[Tally], None]
    ) -> None:
        self._endpoint, self._store, self._tally, self._watch = endpoint, store, tally, watch
        self._secret = _api_key(endpoint)
        self._purse = Purse(budget, endpoint)
        self._tokens = MinuteLimit(endpoint.tokens_per_minute)
        self._http = _PacedClient(MinuteLimit(endpoint.requests_per_minute), endpoint.timeout)
        self._client = AsyncOpenAI(
            api_key=self._secret,
            base_url=endpoint.base_url,
            max_retries=endpoint.max_retries,
            timeout=None,
            http_client=self._http,
        )
        self._failed_in_a_row = 0

    async def ask(self, pending: dict[str, ChatRequest]) -> None:
        running: set[asyncio.Task[None]] = set()
        async with self._client:
            for key, request in pending.items():
                limit = most(request)
                # Those in flight may turn out cheaper than they might be: the budget is spent when none is left.
                while running and (len(running) >= self._endpoint.concurrency or self._exceeded_by(limit)):
                    running = await _until_one_ends(running)
                while not self._tally.stopped and (wait := self._tokens.delay(limit.tokens)):
                    await asyncio.sleep(min(wait, 1.0))
                if not self._tally.stopped and (setting := self._exceeded_by(limit)):
                    self._tally.stopped = f"the budget is spent: {setting} leaves no room for the next request"
                if self._tally.stopped:
                    break
                self._purse.reserve(limit)
                running.add(asyncio.create_task(self._one(key, request, limit, self._tokens.take(limit.tokens))))
            while running:
                running = await _until_one_ends(running)

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
            tally.answered += 1
            self._failed_in_a_row = 0
        else:
            tally.failed[key] = answer
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self._endpoint.give_up_after and not tally.stopped:
                tally.stopped = f"{self._failed_in_a_row} requests in a row failed (endpoint.give_up_after): {answer}"
        self._purse.release(limit)
        tally.sent, tally.spent, tally.cost = (
            self._http.sent,
            self._store.spent,
            cost(self._endpoint, self._store.spent),
        )
        self._watch(tally)

    async def _answer(self, request: ChatRequest) -> Reply | str:
        """The reply, or the reason why there is none; every failure is in the store, with what it cost."""
        model, reason = self._endpoint.model, ""
        create: Any = self._client.chat.completions.with_raw_response.create
        for attempt in range(self._endpoint.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(FIRST_DELAY_S * 2 ** (attempt - 1), 8.0))
            try:
                raw = await create(model=model, messages=request.messages, extra_body=dict(request.parameters))
                return Reply.parse(raw.http_response.content)
            except Unusable as error:
                reason = self._public(str(error))
                self._store.add_failure(request, model, reason, Spent.of(request, error.usage))
                if self._exceeded_by(Spent()):
                    return f"{reason}; the budget leaves no room to ask again"
            except openai.APIError as error:
                if error.code == "content_filter":
                    return Reply("", "content_filter")  # the prompt was filtered: an answer that will not change
                reason = self._public(_reason(error))
                if isinstance(error, openai.AuthenticationError):
                    reason += f" (the key is read from the environment variable {self._endpoint.api_key_variable})"
                if isinstance(error, _HOPELESS) and not self._tally.stopped:
                    self._tally.stopped = reason
                self._store.add_failure(request, model, reason, Spent())
                return reason
        return reason

    def _public(self, reason: str) -> str:
        """One line without the key: servers repeat it when they refuse it."""
        return " ".join(reason.split())[:300].replace(self._secret, "***")


async def _until_one_ends(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    done, left = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left


def _reason(error: openai.APIError) -> str:
    if isinstance(error, openai.APIStatusError):
        after = error.response.headers.get("retry-after")
        # .body is the error object of the answer where it has one, and .message only repeats it with brackets.
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return f"HTTP {error.status_code}: {said or error.message}" + (f" (Retry-After: {after})" if after else "")
    # The client says "Connection error."; what happened stands in the cause.
    cause = error.__cause__
    return f"no answer: {str(cause) or type(cause).__name__}" if cause else error.message
