"""The clients of the service in other stacks: what they send, and what they give back.

In CI their base classes are those of tests/support/stacks.py; in an environment that has a stack, its own.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gadcore.errors import UserError
from gadcore.integrations import text_rewards
from gadcore.integrations.text_rewards import Collector, Sample, by_prompt, scores, without_end
from tests.support import stacks
from tests.support.score_server import score_server

TALK = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Requests to the service, which scores a text by its length."""
    with score_server() as (url, requests):
        monkeypatch.setenv("GADCORE_URL", url)
        text_rewards.service.cache_clear()
        yield requests
        text_rewards.service.cache_clear()


def load(monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> Any:
    """A client, imported anew over its stack."""
    stacks.stand_in(monkeypatch, *names)
    whole = f"gadcore.integrations.{module}"
    # Known to the patch first: it is gone after the test.
    monkeypatch.setitem(sys.modules, whole, None)
    del sys.modules[whole]
    return importlib.import_module(whole)


LABELS = {
    "In Paris.": dict(teacher_response="In Paris.", prompt="Where?"),
    "7": dict(row=7),
    "7 of them": dict(teacher_response="7 of them", prompt="Where?"),
    "[1]": dict(teacher_response="[1]", prompt="Where?"),
    '{"row": 3}': dict(row=3),
    '{"teacher_response": "Rome.", "messages": [{"role": "user", "content": "Q"}]}': dict(
        teacher_response="Rome.", messages=[{"role": "user", "content": "Q"}]
    ),
}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_says_what_the_samples_are_compared_with(label: str, asked: list[Any]) -> None:
    assert scores([(label, "Where?", [Sample("ab"), Sample("c", False)])]) == [[2.0, 1.0]]
    ((path, body),) = asked
    (group,) = body["groups"]
    assert path == "/v1/score_and_update"
    assert group.pop("samples") == ["ab", "c"] and group.pop("finished") == [True, False]
    assert group.pop("teacher_finished") is True
    assert group == LABELS[label]


def test_held_out_prompts_are_scored_alone(asked: list[Any]) -> None:
    held = {"teacher_response": "T", "held_out": True}
    given = [(held, "A", [Sample("a")]), ("T", "B", [Sample("bb")]), (held, "C", [Sample("ccc")])]
    assert scores(given) == [[1.0], [2.0], [3.0]]
    assert [(path, [g["prompt"] for g in body["groups"]]) for path, body in asked] == [
        ("/v1/score_and_update", ["B"]),
        ("/v1/score", ["A", "C"]),
    ]


@pytest.mark.parametrize("label", [None, "", "  ", True, 1.5, ["x"], {"prompt": "x"}])
def test_what_is_no_label_is_refused(label: Any) -> None:
    with pytest.raises(UserError, match="a label must be"):
        scores([(label, "Where?", [Sample("a")])])


def test_a_prompt_must_come_from_somewhere() -> None:
    with pytest.raises(UserError, match="has no prompt"):
        scores([("In Paris.", None, [Sample("a")])])


def test_end_markers_and_groups() -> None:
    assert without_end("Hi<|im_end|>\n", ["</s>", "<|im_end|>"]) == "Hi"
    assert without_end("Hi<|im_end|> ", [""]) == "Hi<|im_end|> "
    assert by_prompt(["a", "b", "a"]) == [[0, 2], [1]]


def test_samples_that_come_one_by_one_are_sent_as_groups() -> None:
    sent = []

    async def send(given: str, samples: Any) -> list[float]:
        sent.append((given, [s.text for s in samples]))
        return [float(len(s.text)) for s in samples]

    async def everything() -> list[float]:
        collector = Collector(send)
        return await asyncio.gather(
            *(
                collector.add(key, 2, key, Sample(text))
                for key, text in (("x", "a"), ("y", "bb"), ("x", "ccc"), ("y", ""))
            )
        )

    assert asyncio.run(everything()) == [1.0, 2.0, 3.0, 0.0]
    assert sorted(sent) == [("x", ["a", "ccc"]), ("y", ["bb", ""])]


def test_a_group_whose_sibling_never_comes_is_scored_without_it() -> None:
    async def send(given: None, samples: Any) -> list[float]:
        return [float(len(samples))] * len(samples)

    async def everything() -> list[float]:
        collector = Collector(send, patience_s=0.05)
        return await asyncio.gather(*(collector.add("x", 3, None, Sample("a")) for _ in range(2)))

    assert asyncio.run(everything()) == [2.0, 2.0]


def test_an_error_reaches_every_sample_of_the_group() -> None:
    async def send(given: None, samples: Any) -> list[float]:
        raise UserError("no service")

    async def everything() -> list[Any]:
        collector = Collector(send)
        return await asyncio.gather(
            *(collector.add("x", 2, None, Sample("a")) for _ in range(2)), return_exceptions=True
        )

    assert [str(error) for error in asyncio.run(everything())] == ["no service"] * 2


class Tokenizer:
    """Letters as tokens, as far as the stacks ask."""

    all_special_tokens = ["<|im_end|>"]

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join("<|im_end|>" if i == 0 else chr(i) for i in ids)


def test_openrlhf(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    module = load(monkeypatch, "openrlhf", "openrlhf.utils.agent")
    drawn = iter(["Paris", "In Rome", "Oslo", "x"])

    class Engine:
        async def generate(self, ids: list[int], *_: Any, **__: Any) -> Any:
            text = next(drawn)
            await asyncio.sleep(0.01 * len(text))
            ended = len(text) > 1
            output = SimpleNamespace(
                token_ids=[ord(c) for c in text] + [0] * ended,
                finish_reason="stop" if ended else "length",
                logprobs=None,
            )
            return SimpleNamespace(outputs=[output])

    async def prompt(executor: Any, text: str) -> list[Any]:
        # As RolloutRayActor.generate_responses does.
        parameters = SimpleNamespace(max_tokens=8, logprobs=None)
        return await asyncio.gather(
            *(executor.execute(text, "The teacher's.", parameters, 64, Tokenizer(), Engine()) for _ in range(2))
        )

    async def everything() -> list[Any]:
        executor = module.AgentExecutor()
        return await asyncio.gather(prompt(executor, "Where?"), prompt(executor, "Who?"))

    where, who = asyncio.run(everything())
    assert [(one["reward"], one["scores"]) for one in (*where, *who)] == [
        (5.0, 5.0),
        (7.0, 7.0),
        (4.0, 4.0),
        (1.0, 1.0),
    ]
    groups = {g["prompt"]: g for _, body in asked for g in body["groups"]}
    assert len(asked) == 2 and sorted(groups["Where?"]["samples"]) == ["In Rome", "Paris"]
    assert dict(zip(groups["Who?"]["samples"], groups["Who?"]["finished"], strict=True)) == {"Oslo": True, "x": False}


def test_slime(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    from gadcore.integrations import slime

    monkeypatch.setattr(slime, "_markers", lambda checkpoint: ("<|im_end|>",))
    kind = stacks.SlimeSample
    status = kind.Status
    samples = [
        kind(1, TALK, "Paris<|im_end|>", "In Paris.", status.COMPLETED),
        kind(2, TALK, "a", "7", status.TRUNCATED),
        kind(1, TALK, "R", "In Paris.", status.TRUNCATED),
    ]
    arguments = SimpleNamespace(hf_checkpoint="x")
    assert asyncio.run(slime.reward(arguments, samples)) == [5.0, 1.0, 1.0]
    ((_, body),) = asked
    assert [g["samples"] for g in body["groups"]] == [["Paris", "R"], ["a"]]
    assert body["groups"][0]["finished"] == [True, False] and body["groups"][0]["messages"] == TALK
    with pytest.raises(UserError, match="--group-rm"):
        asyncio.run(slime.reward(arguments, samples[0]))
    samples[0].label = '{"teacher_response": "In Paris.", "held_out": true}'
    assert asyncio.run(slime.reward(arguments, samples[0])) == 5.0
    assert asked[-1][0] == "/v1/score"


def test_ms_swift(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    module = load(monkeypatch, "swift.plugin", "swift.rewards")
    # ms-swift puts a plugin's folder in front of sys.path: nothing in it may hide a package.
    folder = Path(module.__file__).parent
    assert sorted(path.stem for path in folder.glob("*.py")) == ["__init__", "plugin"]
    reward = importlib.import_module("swift.rewards").orms["gadcore"](args=None)
    texts = ["Paris", "ab", "x"]
    found = reward(
        texts, messages=[[*TALK, {"role": "assistant", "content": text}] for text in texts],
        prompt_id=["p", "q", "p"], is_truncated=[False, False, True], label=["In Paris.", 4, "In Paris."],
        trainer_state=None, request_id=["1", "2", "3"],
    )  # fmt: skip
    assert found == [5.0, 2.0, 1.0]
    ((_, body),) = asked
    assert [g["samples"] for g in body["groups"]] == [["Paris", "x"], ["ab"]]
    assert body["groups"][0]["finished"] == [True, False] and body["groups"][0]["messages"] == TALK
    with pytest.raises(UserError, match="column 'label'"):
        reward(texts, messages=[], prompt_id=[], is_truncated=[])


def test_nemo_rl(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    module = load(monkeypatch, "nemo_rl", "nemo_rl.environments.interfaces", "ray")
    logs = [[*TALK, {"role": "assistant", "content": text}] for text in ("Paris", "ab")]
    known = [{"label": "In Paris."}] * 2
    returned = module.GADSteps({}).step(logs, known)
    assert returned.rewards.tolist() == [5.0, 2.0] and returned.terminateds.all()
    assert returned.answers == ["Paris", "ab"] and len(returned.observations) == 2
    assert asked[-1][0] == "/v1/score_and_update" and asked[-1][1]["groups"][0]["messages"] == TALK
    with pytest.raises(UserError, match="async_engine=false"):
        module.GADSteps().step(logs[:1], known[:1])
    assert module.GADSteps({"held_out": True}).step(logs[:1], known[:1]).rewards.tolist() == [5.0]
    assert asked[-1][0] == "/v1/score"
    with pytest.raises(UserError, match='"label"'):
        module.GADSteps().step(logs, [{}, {}])


def test_verifiers(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    module = load(monkeypatch, "verifiers", "verifiers.v1", "verifiers.v1.envs.best_of_n")

    class Trace:
        def __init__(self, text: str, cut: bool = False, failed: bool = False) -> None:
            self.last_reply, self.is_truncated, self.has_error = text, cut, failed
            self.rewards: dict[str, float] = {}

        def record_reward(self, name: str, value: float) -> None:
            self.rewards[name] = value

    traces = [Trace("Paris"), Trace("", failed=True), Trace("ab", cut=True)]
    data = SimpleNamespace(prompt="Where?", system_prompt="Be short.", teacher_response="In Paris.")
    env = module.GADEnv.__new__(module.GADEnv)
    env.config = SimpleNamespace(held_out=False)
    asyncio.run(env.finalize(SimpleNamespace(data=data), SimpleNamespace(traces=traces)))
    assert [trace.rewards for trace in traces] == [{"discriminator": 5.0}, {}, {"discriminator": 2.0}]
    (group,) = asked[0][1]["groups"]
    assert group["finished"] == [True, False]
    assert group["messages"] == [{"role": "system", "content": "Be short."}, *TALK]
    env.config = SimpleNamespace(held_out=True)
    asyncio.run(env.finalize(SimpleNamespace(data=data), SimpleNamespace(traces=traces)))
    assert asked[-1][0] == "/v1/score"
    del data.teacher_response
    with pytest.raises(UserError, match="teacher_response"):
        asyncio.run(env.finalize(SimpleNamespace(data=data), SimpleNamespace(traces=traces)))


RECORDED = {
    ("openrlhf.utils.agent", "SingleTurnAgentExecutor"): ("__init__", "execute"),
    ("swift.rewards", "ORM"): ("__init__",),
    ("nemo_rl.environments.interfaces", "EnvironmentInterface"): ("step", "global_post_process_and_metrics"),
    ("verifiers.v1", "Env"): ("finalize",),
    ("verl.experimental.reward_loop.reward_manager.base", "RewardManagerBase"): ("__init__", "run_single"),
}


@pytest.mark.parametrize(("where", "methods"), RECORDED.items(), ids=[module for module, _ in RECORDED])
def test_the_recorded_signatures_are_those_of_the_stack(where: tuple[str, str], methods: tuple[str, ...]) -> None:
    module, name = where
    if not stacks.installed(module.partition(".")[0]):
        pytest.skip(f"{module} is not installed here")
    theirs, recorded = getattr(importlib.import_module(module), name), stacks.MODULES[module][name]
    for method in methods:
        assert [*inspect.signature(getattr(theirs, method)).parameters] == [
            *inspect.signature(getattr(recorded, method)).parameters
        ], method


def test_a_missing_trl_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from gadcore.integrations import trl

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "gadcore.integrations.trl.warmup", raising=False)
    monkeypatch.delitem(vars(trl), "GADWarmup", raising=False)
    with pytest.raises(UserError, match=r"GADWarmup needs TRL.*pip install 'gadcore\[trl\]'"):
        trl.GADWarmup  # noqa: B018
    with pytest.raises(AttributeError, match="nothing"):
        trl.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["openrlhf", "swift.plugin", "nemo_rl", "verifiers", "verl.trainer", "verl.reward"])
def test_a_missing_stack_is_told_in_a_sentence(module: str) -> None:
    stack = module.partition(".")[0]
    if stacks.installed(stack):
        pytest.skip(f"{stack} is installed here")
    with pytest.raises(UserError, match="needs"):
        importlib.import_module(f"gadcore.integrations.{module}")
