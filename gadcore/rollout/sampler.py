"""Sampler: responses of the policy as it is now. The one place that knows in which order an engine is asked.

    wake the weights -> update them -> wake the key-value cache -> generate -> sleep -> now and then: the probe

Any other order samples from old weights, from none, or holds memory that nobody uses. What is begun to be drawn ahead
is drawn to its end before the weights are updated again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from gadcore.data.groups import Group, Response
from gadcore.rollout.engine import Done, Drawn, Engine, Pending, SampleRequest, WeightsLost, check_responses
from gadcore.rollout.probe import Probe, few
from gadcore.rollout.weights import WeightSource

States = Callable[[str], AbstractContextManager[None]]
Drawings = list[list[Response]]


class Sampler:
    """Draws from softmax(logits / temperature) of the weights that `weights` has at the time."""

    def __init__(
        self,
        engine: Engine,
        weights: WeightSource,
        *,
        temperature: float,
        max_tokens: int,
        seed: int = 0,
        states: States | None = None,
        waiting: States | None = None,
        probe: Probe | None = None,
    ) -> None:
        """seed: of all samples. states: what entering the states "synchronise" and "rollout" of a shared device takes
        (gadcore.train.phases); None: the sampler has the device for itself, and its engine sleeps after every draw.
        waiting: what waiting for a state's work takes that is done elsewhere; None: nothing.
        probe: asks the trainer now and then about what was drawn, in the state "student".
        """
        self.engine, self.weights = engine, weights
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self._probe = probe
        self._pending: Pending | None = None
        self._alone = states is None
        self._states = _nothing_else if states is None else states
        self._waiting = _nothing_else if waiting is None else waiting

    def draw(self, groups: Sequence[Group], n: int, purpose: str) -> None:
        """Gives every group n samples, in place of those it has.

        purpose: what they are for, for example "gad/3": a prompt's samples depend on the seed, the purpose and the
        prompt's index alone.
        """
        self.give(groups, self.generate(self.requests(groups, n, purpose)))

    def requests(self, groups: Sequence[Group], n: int, purpose: str) -> list[SampleRequest]:
        """What draw() asks of the engine."""
        return [SampleRequest(g.prompt.token_ids, n, derived_seed(self.seed, purpose, g.prompt.index)) for g in groups]

    def give(self, groups: Sequence[Group], responses: Sequence[list[Response]]) -> None:
        """Gives every group its responses as samples, in place of those it has."""
        for group, samples in zip(groups, responses, strict=True):
            group.samples = samples

    def begin(self, groups: Sequence[Group], n: int, purpose: str) -> Pending:
        """Begins on what draw() would give, from the weights as they are now. Its responses are given by give().

        Whatever is drawn next waits until it is over. The probe looks at a few samples that are drawn before, since
        the weights will be others when these are there.
        """
        requests = self.requests(groups, n, purpose)
        due = self._probe is not None and self._probe.due()
        before = few(requests) if due else []
        try:
            looked, pending = self._begun(requests, before)
        except WeightsLost:
            looked, pending = self._begun(requests, before)
        self._pending = None if isinstance(pending, Drawn) else pending
        if self._probe is not None and due:
            with self._states("student"):
                self._probe.check(before, looked)
        return pending

    def awaited(self, pending: Pending, places: Sequence[int]) -> list[list[Response]]:
        """The responses to the requests at these places of what was begun."""
        with self._waiting("rollout"):
            return pending.responses(places)

    def generate(self, requests: Sequence[SampleRequest], done: Done | None = None) -> list[list[Response]]:
        """Per request its n responses. done: told of each as soon as it has them, see Engine.generate(); twice where an
        engine lost its weights on the way.
        """
        try:
            responses = self._drawn(requests, done)
        except WeightsLost:
            # Seeds decide the samples: what was drawn already comes out the same.
            responses = self._drawn(requests, done)
        if self._alone:
            self.engine.sleep()
        if self._probe is not None and self._probe.due():
            with self._states("student"):
                self._probe.check(requests, responses)
        return responses

    def _drawn(self, requests: Sequence[SampleRequest], done: Done | None) -> list[list[Response]]:
        """The engine's responses under the weights as they are now."""
        self._synchronise()
        with self._states("rollout"):
            self.engine.wake("kv_cache")
            # An engine that is trained with only need not know of it.
            told = {} if done is None else {"done": done}
            found = self.engine.generate(requests, temperature=self.temperature, max_tokens=self.max_tokens, **told)
        check_responses(self.engine, requests, found, self.max_tokens)
        return found

    def _begun(self, requests: Sequence[SampleRequest], before: Sequence[SampleRequest]) -> tuple[Drawings, Pending]:
        """(the responses to what is drawn before, the requests as they are being drawn)."""
        self._synchronise()
        with self._states("rollout"):
            self.engine.wake("kv_cache")
            found: Drawings = []
            if before:
                found = self.engine.generate(before, temperature=self.temperature, max_tokens=self.max_tokens)
                check_responses(self.engine, before, found, self.max_tokens)
            return found, self.engine.begin(requests, temperature=self.temperature, max_tokens=self.max_tokens)

    def _synchronise(self) -> None:
        """The engine gets the weights as they are now, when it is at work no more."""
        if self._pending is not None:
            with self._waiting("rollout"):
                self._pending.wait()
            self._pending = None
        with self._states("synchronise"):
            self.engine.wake("weights")
            self.engine.update_weights(self.weights)


@contextmanager
def _nothing_else(state: str) -> Iterator[None]:
    yield


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A seed that depends on its arguments alone, so that a resumed run draws the same samples."""
    digest = hashlib.blake2b(json.dumps([seed, purpose, index]).encode(), digest_size=6)
    return int.from_bytes(digest.digest(), "big")
