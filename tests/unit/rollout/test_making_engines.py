"""What an engine finds on the device when it is made: the student's weights, or room for its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from gadcore.config.settings import Config
from gadcore.distributed.world import World
from gadcore.errors import UserError
from gadcore.rollout import vllm
from gadcore.rollout.engine import ENGINES, Engine, make_engine
from tests.support.builders import TEMPLATE
from tests.support.tiny import tiny_model


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def there(log):
    @contextmanager
    def there() -> Iterator[None]:
        log.append("weights come")
        yield
        log.append("weights leave")

    return there


def test_an_engine_finds_the_weights_where_it_says_nothing_else(monkeypatch, log, there) -> None:
    class Plain(Engine):
        def __init__(self, config, model_path, model, template) -> None:
            log.append("made")

        def generate(self, requests, *, temperature, max_tokens, done=None):
            return []

        def update_weights(self, source) -> None: ...

        def weights(self):
            return {}

    monkeypatch.setitem(ENGINES, "hf", f"{__name__}:Plain")
    monkeypatch.setitem(globals(), "Plain", Plain)
    make_engine(Config.model_validate({"rollout": {"engine": "hf"}}), "", tiny_model(), TEMPLATE, there)
    assert log == ["weights come", "made", "weights leave"]


def test_vllm_starts_before_the_weights_come(monkeypatch, log, there) -> None:
    """It looks at what is free of a GPU's memory when it starts."""
    model = tiny_model()

    def says(what: str, result: object = None):
        def call(*args: object, **kwargs: object) -> object:
            log.append(what)
            return result

        return call

    monkeypatch.setattr(vllm, "import_vllm", lambda *_: None)
    monkeypatch.setattr(vllm, "start", says("started", SimpleNamespace(apply_model=lambda read: [read(model)])))
    monkeypatch.setattr(vllm, "check_distribution", says("checked"))
    monkeypatch.setattr(vllm.WholeWeights, "match", says("compared"))
    for name, what, result in (
        ("_find_kv_cache", "cache found", []),
        ("_draw", "sampled", [[None]]),
        ("sleep", "asleep", None),
    ):
        monkeypatch.setattr(vllm.VLLMEngine, name, says(what, result))
    config = Config.model_validate({"rollout": {"dtype": "bfloat16", "enforce_eager": False}})
    make_engine(config, "", model, TEMPLATE, there)
    assert log == [
        "started", "cache found", "sampled", "weights come", "compared", "checked", "weights leave", "asleep",
    ]  # fmt: skip


def test_an_engine_of_one_process_is_refused_to_several(monkeypatch) -> None:
    class Alone(Engine):
        def generate(self, requests, *, temperature, max_tokens, done=None):
            return []

        def update_weights(self, source) -> None: ...

        def weights(self):
            return {}

    monkeypatch.setitem(ENGINES, "hf", f"{__name__}:Alone")
    monkeypatch.setitem(globals(), "Alone", Alone)
    config = Config.model_validate({"rollout": {"engine": "hf"}})
    with pytest.raises(UserError, match='rollout.engine = "hf" samples in one process, and 4 train together'):
        make_engine(config, "", tiny_model(), TEMPLATE, world=World(0, 4))


def test_nothing_is_said_of_triton_where_a_cpu_samples() -> None:
    pytest.importorskip("vllm")
    program = """
from torch.nn.functional import linear
from gadcore.config.rollout import VLLMSettings
from gadcore.rollout.vllm_start import import_vllm
import_vllm(VLLMSettings(engine="vllm"), linear)
import vllm.triton_utils
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "Triton" not in done.stdout + done.stderr
