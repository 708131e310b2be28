"""The sampler's order, with an engine that keeps a log; what an engine takes: one class."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.errors import UserError
from gadcore.memory.colocation import Colocation
from gadcore.rollout.engine import Engine, Pending, WeightsLost, engine_class, make_engine
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.weights import PlainWeights, checksums, fingerprint
from tests.support.builders import TEMPLATE, groups
from tests.support.reads import device_reads
from tests.support.tiny import tiny_model


class Echo(Engine):
    """Answers every prompt with its own tokens, and logs what it is asked."""

    def __init__(self, config, model_path, model, template) -> None:
        self.model, self.log = model, []

    def generate(self, requests, *, temperature, max_tokens):
        self.log.append("generate")
        self.seeds = [r.seed for r in requests]
        return [[Response("x", r.prompt_ids[:max_tokens], False, (0.0,) * max_tokens)] * r.n for r in requests]

    def update_weights(self, source) -> None:
        self.log.append(f"update {len(list(source))}")

    def weights(self):
        return dict(self.model.named_parameters())

    def wake(self, part) -> None:
        self.log.append(f"wake {part}")

    def sleep(self) -> None:
        self.log.append("sleep")


@pytest.fixture
def echo():
    config = Config.model_validate({"rollout": {"engine": f"{__name__}:Echo"}})
    return make_engine(config, "", tiny_model(), TEMPLATE)


def sampler(engine: Echo, **kwargs) -> Sampler:
    return Sampler(engine, PlainWeights(engine.model), temperature=0.8, max_tokens=5, seed=3, **kwargs)


def test_an_engine_is_a_class(echo) -> None:
    assert type(echo).__name__ == "Echo" and engine_class(Config()).__name__ == "VLLMEngine"
    assert echo.shared and echo.held() == {} and echo.aliases() == [] and echo.close() is None


GOOD = Response("x", (1, 2), True, (0.0, 0.0))


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (None, "must return a list of responses to each of 1 requests: got 0"),
        ([[GOOD, GOOD], [GOOD, GOOD]], "must return a list of responses to each of 1 requests: got 2"),
        ([[GOOD]], r"must return 2 responses to a request: got \[Response"),
        ([None], "must return 2 responses to a request: got None"),
        ([["x", "y"]], "must return gadcore.data.groups.Response: got str"),
        ([[GOOD, replace(GOOD, token_ids=[1, 2])]], r"a tuple of 1 to 5 token ids a response: got \[1, 2\]"),
        ([[GOOD, replace(GOOD, token_ids=())]], r"a tuple of 1 to 5 token ids a response: got \(\)"),
        ([[GOOD, replace(GOOD, token_ids=(1,) * 6)]], "a tuple of 1 to 5 token ids a response"),
        ([[GOOD, replace(GOOD, logprobs=())]], "must return a log-prob for each of 2 tokens: got 0"),
    ],
)
def test_what_an_engine_may_not_return_is_told_by_its_name(echo, monkeypatch, found, rule) -> None:
    monkeypatch.setattr(echo, "generate", lambda *_, **__: found)
    with pytest.raises(UserError, match=f"the engine Echo .*{rule}"):
        sampler(echo).draw(groups(1, 0), 2, "gad/1")
    with pytest.raises(UserError, match=f"the engine Echo .*{rule}"):
        sampler(echo).begin(groups(1, 0), 2, "gad/1")


def test_alone_it_wakes_updates_generates_and_sleeps(echo) -> None:
    batch = groups(3, 0)
    sampler(echo).draw(batch, 4, "gad/1")
    updates = len(list(echo.model.parameters()))
    assert echo.log == ["wake weights", f"update {updates}", "wake kv_cache", "generate", "sleep"]
    assert all(len(group.samples) == 4 for group in batch)
    first = echo.seeds
    sampler(echo).draw(batch, 4, "gad/1")
    assert echo.seeds == first and len(set(first)) == 3
    sampler(echo).draw(batch, 4, "gad/2")
    assert not set(echo.seeds) & set(first)


def test_beside_others_the_device_is_entered_before_each_part(echo) -> None:
    @contextmanager
    def states(name):
        echo.log.append(f"enter {name}")
        yield
        echo.log.append(f"leave {name}")

    sampler(echo, states=states).draw(groups(1, 0), 2, "evaluation")
    assert [entry.split()[0] for entry in echo.log] == [
        "enter", "wake", "update", "leave", "enter", "wake", "generate", "leave",
    ]  # fmt: skip


class Loses(Echo):
    """Loses its weights while it samples, some times."""

    times = 1

    def generate(self, requests, *, temperature, max_tokens):
        drawn = super().generate(requests, temperature=temperature, max_tokens=max_tokens)
        if self.times:
            self.times -= 1
            raise WeightsLost("it was restarted")
        return drawn


def test_an_engine_that_lost_its_weights_gets_them_again_once() -> None:
    engine = Loses(Config(), "", tiny_model(), TEMPLATE)
    batch = groups(3, 0)
    sampler(engine).draw(batch, 4, "gad/1")
    assert [entry.split()[0] for entry in engine.log] == [*("wake", "update", "wake", "generate") * 2, "sleep"]
    engine.times = 2
    with pytest.raises(WeightsLost):
        sampler(engine).draw(batch, 4, "gad/1")


class Looks:
    """A probe that keeps a log."""

    def __init__(self, log: list[str], *due: bool) -> None:
        self.log, self._due = log, list(due)

    def due(self) -> bool:
        return self._due.pop(0)

    def check(self, requests, responses) -> None:
        self.log.append(f"probe of {len(requests)}, {len(responses)}")


def test_the_probe_looks_where_it_is_due_in_the_trainers_state(echo) -> None:
    @contextmanager
    def states(name):
        echo.log.append(f"enter {name}")
        yield

    made = sampler(echo, states=states, probe=Looks(echo.log, True, False))
    made.draw(groups(3, 0), 4, "gad/1")
    assert echo.log[-3:] == ["generate", "enter student", "probe of 3, 3"]
    made.draw(groups(3, 0), 4, "gad/2")
    assert echo.log[-1] == "generate"


class Beside(Echo):
    """Has what it begins when it is asked for it."""

    def begin(self, requests, *, temperature, max_tokens):
        self.log.append(f"begin {len(requests)}")
        return Asked(self, [[Response("x", r.prompt_ids[:max_tokens], False, (0.0,) * 3)] * r.n for r in requests])


class Asked(Pending):
    def __init__(self, engine: Beside, drawn) -> None:
        self._engine, self._drawn = engine, drawn

    def responses(self, places):
        self._engine.log.append(f"responses {list(places)}")
        return [self._drawn[place] for place in places]

    def wait(self) -> None:
        self._engine.log.append("wait")


def test_what_is_begun_ends_before_the_weights_are_updated_again() -> None:
    engine = Beside(Config(), "", tiny_model(), TEMPLATE)

    @contextmanager
    def states(name):
        engine.log.append(f"enter {name}")
        yield

    @contextmanager
    def waiting(name):
        engine.log.append(f"await {name}")
        yield

    made = sampler(engine, states=states, waiting=waiting, probe=Looks(engine.log, False, True, False))
    batch = groups(5, 0)
    pending = made.begin(batch, 4, "gad/2")
    begun = ["enter synchronise", "wake weights", "update", "enter rollout", "wake kv_cache"]
    assert ["update" if entry.startswith("update") else entry for entry in engine.log] == [*begun, "begin 5"]
    engine.log.clear()
    made.give(batch, made.awaited(pending, range(5)))
    assert engine.log == ["await rollout", "responses [0, 1, 2, 3, 4]"]
    assert all(len(group.samples) == 4 for group in batch)
    engine.log.clear()
    # The probe's samples are drawn before, and looked at while the batch is drawn.
    made.begin(batch, 4, "gad/3")
    assert engine.log[:3] == ["await rollout", "wait", "enter synchronise"]
    assert engine.log[-5:] == ["wake kv_cache", "generate", "begin 5", "enter student", "probe of 4, 4"]
    assert set(engine.seeds) < {request.seed for request in made.requests(batch, 4, "gad/3")}
    engine.log.clear()
    made.draw(batch, 4, "evaluation")
    assert engine.log[:3] == ["await rollout", "wait", "enter synchronise"] and engine.log[-1] == "generate"


def test_an_engine_with_the_trainers_devices_has_all_of_it_at_once(echo) -> None:
    made = sampler(echo)
    batch = groups(3, 0)
    pending = made.begin(batch, 4, "gad/2")
    assert echo.log[-1] == "generate" and not type(echo).samples_elsewhere(Config(), "cpu")
    made.give(batch, made.awaited(pending, range(3)))
    made.draw(other := groups(3, 0), 4, "gad/2")
    assert [group.samples for group in batch] == [group.samples for group in other]


def test_a_device_that_others_share_wakes_a_part_once(echo, tmp_path) -> None:
    memory = Colocation(torch.device("cpu"), Config().memory, tmp_path, echo, shared=True)
    for state in ("student", "synchronise", "rollout", "discriminator"):
        memory.enter(state)
    assert echo.log == ["sleep", "wake weights", "wake kv_cache", "sleep"]


def test_a_fingerprint_takes_one_read(echo) -> None:
    weights = PlainWeights(echo.model)
    with device_reads() as reads:
        checksums(weights)
        assert not reads
        fingerprint(weights)
    assert reads.total() == 1, reads
