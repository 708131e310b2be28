"""The queue before the model: one thread owns it, requests wait for it in order, groups become updates."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.service.journal import JSON, Entry
from gadcore.integrations.service.metrics import Metrics
from gadcore.integrations.service.owner import Owner, Request, answers_of
from gadcore.integrations.service.refused import Refused
from gadcore.integrations.service.settings import ServiceSettings

_log = logging.getLogger(__name__)
# Of the time that an update takes per group: how far the last one counts.
_LAST = 0.3


@dataclass
class _Job:
    """call: what is done, None for a request that becomes part of an update."""

    call: Callable[[Owner], JSON] | None
    groups: int
    request: Request | None = None
    future: Future[JSON] = field(default_factory=Future)
    came: float = field(default_factory=time.monotonic)


class Worker:
    """Its thread is the only one that touches the Owner; submit methods are for the one thread of the server."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics, *, on_death: Callable[[], None]) -> None:
        """on_death: called where the thread ends by an error that leaves the model in doubt."""
        self._settings, self._metrics, self._on_death = settings, metrics, on_death
        self._changed = threading.Condition()
        # In order: updates and whatever changes the weights or moves them. Scores change nothing and may go before.
        self._ordered: deque[_Job] = deque()
        self._scores: deque[_Job] = deque()
        self._pending: dict[str, _Job] = {}
        self._stopping = False
        self._group_s = 0.0
        self._thread = threading.Thread(target=self._run, name="discriminator", daemon=True)
        self._made: Future[list[str]] = Future()
        self.owner: Owner | None = None
        self.error: BaseException | None = None
        # Whether all is saved and nothing more is done.
        self.closed = False

    # For the server's thread

    def start(self, make: Callable[[], tuple[Owner, list[str]]]) -> list[str]:
        """Makes the Owner in the thread; returns its notes as it is ready. Raises what make() does."""
        self._make = make
        self._thread.start()
        return self._made.result()

    def stop(self) -> None:
        """Ends the update that is at work, leaves what waits unanswered, and closes the Owner."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting_groups(self) -> int:
        with self._changed:
            return sum(job.groups for job in (*self._ordered, *self._scores))

    def train(self, request: Request) -> tuple[Future[JSON], bool]:
        """(the answer to come, whether the request had come before)."""
        owner = self._ready()
        with self._changed:
            job = self._pending.get(request.id)
        if job is not None and job.request is not None:
            _same(job.request.digest, request)
            return job.future, True
        entry = owner.journal.find(request.id)
        if entry is not None:
            _same(entry.digest, request)
            return _answered(entry), True
        job = _Job(None, len(request.groups), request)
        self._put(self._ordered, job)
        return job.future, False

    def score(self, request: Request) -> Future[JSON]:
        def call(owner: Owner) -> JSON:
            _awake(owner)
            scores = owner.score(owner.groups_of(request.groups))
            return next(iter(answers_of([request], scores, owner.version, owner.version).values()))

        job = _Job(call, len(request.groups))
        self._put(self._scores, job)
        return job.future

    def do(self, call: Callable[[Owner], JSON]) -> Future[JSON]:
        """What is no scoring, after everything that came before it."""
        job = _Job(call, 0)
        self._put(self._ordered, job)
        return job.future

    def _ready(self) -> Owner:
        if self.owner is None or self._stopping or self.error is not None:
            raise Refused(503, "stopping", "the service is being stopped: ask again once it has started", 5)
        return self.owner

    def _put(self, queue: deque[_Job], job: _Job) -> None:
        self._ready()
        waiting = self.waiting_groups
        if job.groups and waiting and waiting + job.groups > self._settings.waiting_groups:
            seconds = min(60, max(1, math.ceil(waiting * self._group_s)))
            raise Refused(
                429, "busy", f"{waiting} groups wait, the service takes {self._settings.waiting_groups} "
                f"(service.waiting_groups): ask again in {seconds} s", seconds,
            )  # fmt: skip
        with self._changed:
            if job.request is not None:
                self._pending[job.request.id] = job
            queue.append(job)
            self._changed.notify()

    # The worker's thread

    def _run(self) -> None:
        try:
            self.owner, notes = self._make()
        except BaseException as error:
            self._made.set_exception(error)
            return
        self._made.set_result(notes)
        try:
            while (jobs := self._next()) is not None:
                self._do(self.owner, jobs)
            self._leave("the service was stopped before this request's turn: ask again once it has started")
            self.owner.close()
            self.closed = True
        except BaseException as error:
            # Nobody knows what the model is now. The journal does: the next start goes on from it.
            self.error = error
            _log.exception("the discriminator's thread has ended")
            self._leave("the service has ended by an error of its own: ask again once it has started")
            self._on_death()

    def _next(self) -> list[_Job] | None:
        """What is to be done next: requests that make an update, or one other job. None: nothing any more."""
        with self._changed:
            while not self._stopping:
                ready = self._whole_update()
                if self._scores and (not ready or self._scores[0].came < ready[0].came):
                    return [self._scores.popleft()]
                if ready:
                    for _ in ready:
                        self._ordered.popleft()
                    return ready
                waits = None
                if self._ordered:
                    waits = self._ordered[0].came + self._settings.batch_seconds - time.monotonic()
                self._changed.wait(waits)
            return None

    def _whole_update(self) -> list[_Job]:
        """From the front of the queue: another job, or enough requests for an update, or all that came in its time."""
        jobs: list[_Job] = []
        for job in self._ordered:
            if job.request is None:
                # It is to see all that came before it.
                return jobs or [job]
            jobs.append(job)
            if sum(each.groups for each in jobs) >= self._settings.batch_groups:
                return jobs
        late = jobs and time.monotonic() >= jobs[0].came + self._settings.batch_seconds
        return jobs if late else []

    def _do(self, owner: Owner, jobs: Sequence[_Job]) -> None:
        if (call := jobs[0].call) is not None:
            self._finish(jobs[0], lambda: call(owner))
            return
        start = time.monotonic()
        fitting: list[tuple[_Job, Request, list[Any]]] = []
        for job in jobs:
            assert job.request is not None
            try:
                _awake(owner)
                fitting.append((job, job.request, owner.groups_of(job.request.groups)))
            except (UserError, Refused) as error:
                self._end(job, error=_refused(error))
        if owner.frozen:
            for job, request, groups in fitting:
                self._finish(job, lambda r=request, g=groups: owner.score_for(r, g))  # type: ignore[misc]
        elif fitting:
            self._train(owner, fitting)
        seconds = (time.monotonic() - start) / sum(job.groups for job in jobs)
        self._group_s += (seconds - self._group_s) * (_LAST if self._group_s else 1.0)

    def _train(self, owner: Owner, fitting: Sequence[tuple[_Job, Request, list[Any]]]) -> None:
        try:
            with self._metrics.update_seconds.time():
                answers = owner.train([r for _, r, _ in fitting], [g for _, _, groups in fitting for g in groups])
        except Refused as refused:
            for job, _, _ in fitting:
                self._end(job, error=refused)
            return
        for job, request, _ in fitting:
            self._end(job, answers[request.id])
        if owner.checkpoint_due():
            try:
                owner.checkpoint_own()
            except UserError as error:
                _log.warning("%s", error)

    def _finish(self, job: _Job, call: Callable[[], JSON]) -> None:
        try:
            self._end(job, call())
        except (UserError, Refused) as error:
            self._end(job, error=_refused(error))

    def _end(self, job: _Job, answer: JSON = None, *, error: BaseException | None = None) -> None:
        with self._changed:
            # After the journal has it: whoever does not find it here finds it there.
            if job.request is not None:
                self._pending.pop(job.request.id, None)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(answer) if error is None else job.future.set_exception(error)

    def _leave(self, why: str) -> None:
        with self._changed:
            self._stopping = True
            jobs = [*self._ordered, *self._scores, *self._pending.values()]
            self._ordered.clear()
            self._scores.clear()
        for job in jobs:
            if not job.future.done():
                self._end(job, error=Refused(503, "stopping", why, 5))


def _awake(owner: Owner) -> None:
    if owner.asleep:
        raise Refused(503, "asleep", "the discriminator sleeps: POST /v1/wake first", 1)


def _same(digest: str, request: Request) -> None:
    if digest != request.digest:
        raise Refused(
            409, "other_groups", f"the request id {request.id!r} was used for other groups: give every request its own"
        )


def _answered(entry: Entry) -> Future[JSON]:
    future: Future[JSON] = Future()
    if entry.state == "done":
        future.set_result(entry.answer)
    else:
        future.set_exception(Refused(500, entry.answer["code"], entry.answer["message"]))
    return future


def _refused(error: UserError | Refused) -> Refused:
    return error if isinstance(error, Refused) else Refused(422, "unfit", str(error))
