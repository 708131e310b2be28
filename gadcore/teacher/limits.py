"""Limits per minute, and the budget. Both are asked before a request and corrected by what it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gadcore.teacher.settings import Budget, Endpoint
from gadcore.teacher.store import ChatRequest, Spent

WINDOW_S = 60.0


@dataclass
class Taken:
    """An amount that counts against a limit until `at` + 60 seconds; amount may be corrected."""

    at: float
    amount: int


class MinuteLimit:
    """At most `limit` in any 60 seconds: a sliding window, so the first minute admits no burst of twice as much.

    limit: None admits everything. An amount above the limit waits for an empty minute.
    clock: seconds, monotonic.
    """

    def __init__(self, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._window: deque[Taken] = deque()

    def delay(self, amount: int = 1) -> float:
        """Seconds until so much would be admitted, if nobody else takes anything; 0.0: now."""
        if self._limit is None:
            return 0.0
        now = self._clock()
        while self._window and self._window[0].at + WINDOW_S <= now:
            self._window.popleft()
        excess = sum(taken.amount for taken in self._window) + min(amount, self._limit) - self._limit
        if excess <= 0:
            return 0.0
        for taken in self._window:
            excess -= taken.amount
            if excess <= 0:
                return taken.at + WINDOW_S - now
        raise AssertionError("an empty window admits everything")

    def take(self, amount: int = 1) -> Taken:
        """Counts the amount from now on; set .amount of what comes back when the true figure is known."""
        taken = Taken(self._clock(), amount)
        if self._limit is not None:
            self._window.append(taken)
        return taken


class Purse:
    """Whether one more request fits into the budget, beside what was spent and what those in flight may still cost.

    A request counts as its estimated prompt and the longest response that it allows until it is answered, so the
    budget can be exceeded only by wrong estimates of prompts, and by requests without a limit on their response.
    """

    def __init__(self, budget: Budget, endpoint: Endpoint) -> None:
        self._budget, self._endpoint = budget, endpoint
        self._reserved = Spent()

    def reserve(self, amount: Spent) -> None:
        self._reserved = self._reserved.plus(amount)

    def release(self, amount: Spent) -> None:
        self._reserved = self._reserved.minus(amount)

    def exceeded_by(self, amount: Spent, spent: Spent) -> str | None:
        """The setting that stands against so much more; None where it fits."""
        total = spent.plus(self._reserved).plus(amount)
        checks = (
            ("budget.requests", self._budget.requests, total.requests),
            ("budget.tokens", self._budget.tokens, total.tokens),
            ("budget.money", self._budget.money, cost(self._endpoint, total)),
        )
        for name, limit, reached in checks:
            if limit is not None and reached is not None and reached > limit:
                return f"{name} = {limit}"
        return None


def most(request: ChatRequest) -> Spent:
    """The most that a request is expected to cost: its estimated prompt and the longest response that it allows."""
    return Spent(1, request.prompt_estimate(), request.response_limit())


def cost(endpoint: Endpoint, spent: Spent) -> float | None:
    """Money, by the endpoint's prices per million tokens; None where a price is not given."""
    if endpoint.price_input is None or endpoint.price_output is None:
        return None
    return (spent.prompt * endpoint.price_input + spent.response * endpoint.price_output) / 1e6
