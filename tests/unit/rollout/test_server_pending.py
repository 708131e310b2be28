"""Requests under way at a server while the trainer computes: a small server that takes its time, restarts and fails."""

from __future__ import annotations

import threading
import time

import pytest

from gadcore.data.groups import Response
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.rollout.engine import WeightsLost
from gadcore.rollout.server_client import Client, ServerGone
from gadcore.rollout.server_pending import ServerPending
from tests.support.ranks import run_ranks
from tests.unit.rollout.test_server_client import TOKEN, Stub, client_of

ROUTE = "/inference/v1/generate"


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.close()


def pending_of(client: Client | None, count: int, log: list[str], *, world: World = ALONE, ours=True) -> ServerPending:
    def read(place, answer):
        return [Response(f"{answer['text']} {place}", (place,), True)] if ours else None

    return ServerPending(
        client,
        [{"place": place} for place in range(count)],
        read=read,
        back=lambda: log.append("back"),
        lost=lambda: log.append("lost"),
        world=world,
    )


def texts(found) -> list[str]:
    return [response.text for (response,) in found]


def test_answers_come_while_the_trainer_works(stub: Stub, monkeypatch) -> None:
    stub.answers[ROUTE] = {"text": "sample"}
    handle = Client._read

    def delayed(self, response, path):
        time.sleep(0.15)
        return handle(self, response, path)

    monkeypatch.setattr(Client, "_read", delayed)
    log: list[str] = []
    begin = time.perf_counter()
    pending = pending_of(client_of(stub), 6, log)
    assert time.perf_counter() - begin < 0.5, "nobody waits for it"
    assert texts(pending.responses([4, 1])) == ["sample 4", "sample 1"]
    pending.wait()
    assert texts(pending.responses(range(6))) == [f"sample {place}" for place in range(6)] and log == []
    assert sorted(content["place"] for path, content in stub.log if path == ROUTE) == list(range(6))


def test_a_server_that_has_other_weights_has_lost_them(stub: Stub) -> None:
    stub.answers[ROUTE] = {"text": "sample"}
    log: list[str] = []
    pending = pending_of(client_of(stub), 2, log, ours=False)
    with pytest.raises(WeightsLost, match="restarted while it sampled ahead"):
        pending.responses([0, 1])
    assert log == ["lost"]


def test_a_server_that_is_gone_is_waited_for(monkeypatch) -> None:
    def gone(self, bodies, done):
        done(0, {"text": "sample"})
        raise ServerGone("it ended")

    monkeypatch.setattr(Client, "generate", gone)
    log: list[str] = []
    pending = pending_of(Client("http://127.0.0.1:9", TOKEN, timeout_s=5), 2, log)
    pending.wait()
    assert texts(pending.responses([0])) == ["sample 0"] and log == []
    with pytest.raises(WeightsLost):
        pending.responses([1])
    assert log == ["back", "lost"]


def test_what_a_server_refuses_is_told_where_it_is_asked_for(stub: Stub) -> None:
    pending = pending_of(client_of(stub, "wrong"), 2, [])
    pending.wait()
    with pytest.raises(UserError, match="does not take the token"):
        pending.responses([0, 1])


def test_what_is_abandoned_ends_at_once(stub: Stub) -> None:
    """As a run ends by an error while the server samples."""
    held = threading.Event()
    answers = stub.answers

    class Held(dict):
        def get(self, path, other=None):
            if path == ROUTE:
                held.wait(20)
            return answers.get(path, other)

    stub.answers = Held()
    pending = pending_of(client_of(stub), 3, [])
    while len(stub.log) < 3:
        time.sleep(0.01)
    begin = time.perf_counter()
    pending.abandon()
    pending.wait()
    assert time.perf_counter() - begin < 4
    held.set()


def over_ranks(world: World, url: str) -> list:
    log: list[str] = []
    client = Client(url, TOKEN, timeout_s=5) if world.is_first else None
    pending = pending_of(client, 3, log, world=world)
    found = texts(pending.responses([2, 0]))
    pending.wait()
    return [found, log]


def test_every_rank_has_the_responses(stub: Stub) -> None:
    stub.answers[ROUTE] = {"text": "sample"}
    assert run_ranks(2, f"{__name__}:over_ranks", stub.url) == [[["sample 2", "sample 0"], []]] * 2
    assert sum(path == ROUTE for path, _ in stub.log) == 3
