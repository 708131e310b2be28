"""Requests under way at a vLLM server while the trainer computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gadcore.data.groups import Response
from gadcore.distributed.world import World
from gadcore.rollout.engine import Pending, WeightsLost
from gadcore.rollout.server_client import Client, ServerGone

# What becomes of an answer to the request at a place; None where it was not sampled by this trainer's weights.
Read = Callable[[int, Mapping[str, Any]], list[Response] | None]


class ServerPending(Pending):
    """Of several ranks the first one asks, by a thread, and all have the responses.

    The thread keeps answers as they come and does nothing else: tokens become text where they are asked for.
    """

    def __init__(
        self,
        client: Client | None,
        bodies: Sequence[Mapping[str, Any]],
        *,
        read: Read,
        back: Callable[[], None],
        lost: Callable[[], None],
        world: World,
    ) -> None:
        """client: None but in the first process. back: returns when a server that is gone is there again. lost: called
        in every process where the answers are of no use."""
        self._world, self._count = world, len(bodies)
        self._read, self._back, self._lost = read, back, lost
        self._answers: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._client, self._thread = client, None
        if client is not None:
            # Where the run ends by an error nobody waits for answers.
            self._thread = threading.Thread(target=self._ask, args=(client, bodies), name="samples", daemon=True)
            self._thread.start()

    def _ask(self, client: Client, bodies: Sequence[Mapping[str, Any]]) -> None:
        try:
            client.generate(bodies, self._answered)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _answered(self, place: int, answer: Any) -> None:
        with self._changed:
            self._answers[place] = answer
            self._changed.notify_all()

    def responses(self, places: Sequence[int]) -> list[list[Response]]:
        found: list[list[Response]] | None = None
        with self._world.agreeing():
            if self._world.is_first:
                found = self._here(places)
        found = self._world.broadcast_object(found)
        if found is None:
            self._lost()
            raise WeightsLost("the vLLM server was restarted while it sampled ahead")
        return found

    def _here(self, places: Sequence[int]) -> list[list[Response]] | None:
        """In the first process; None where the server was restarted, and is there again."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or all(i in self._answers for i in places))
            missing = any(i not in self._answers for i in places)
        if missing:
            assert self._error is not None
            if not isinstance(self._error, ServerGone):
                raise self._error
            self._back()
            return None
        found = []
        for place in places:
            samples = self._read(place, self._answers[place])
            if samples is None:
                return None
            found.append(samples)
        return found

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def abandon(self) -> None:
        """Ends what is under way: nobody will ask for it."""
        if self._client is not None and self._thread is not None and self._thread.is_alive():
            self._client.abandon()
            self._thread.join(timeout=5)
