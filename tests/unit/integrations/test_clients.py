"""Every stack's client against the real service: one process over a tiny model, asked as the stack would ask.

In CI the stack's own classes are those of tests/support/stacks.py, and TRL's; in an environment that has a stack, its
own (docs/guide/stacks.md says which were run). The scores must be those that the service gives the same texts under the
same weights, and a call must train them once, or, where they are held out, never.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gadcore.integrations import text_rewards
from gadcore.integrations.client import DiscriminatorClient, ServiceError, TextGroup
from tests.support import stacks
from tests.support.service import ServiceProcess, settings
from tests.support.tiny import tiny_tokenizer

pytest.importorskip("fastapi")

GROUPS = [
    TextGroup(["on the Seine", "at zero"], messages=[{"role": "user", "content": "Where is Paris?"}],
              teacher_response="In France.", finished=[True, False]),
    TextGroup(["Paris", "at one hundred"], messages=[{"role": "user", "content": "When does water boil?"}],
              teacher_response="At one hundred degrees.", finished=[True, True]),
]  # fmt: skip
END = 2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """An update is of two groups: of both that a client sends at once, or of two requests with one each."""
    folder = tmp_path_factory.mktemp("service")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GADCORE_TOKEN", "of-the-tests")
        started = ServiceProcess(folder, settings(folder, service__batch_groups=2, service__batch_seconds=5))
        started.start()
        try:
            started.wait_until_ready()
            patch.setenv("GADCORE_URL", started.url)
            yield started
        finally:
            started.end()


def told(group: TextGroup, held_out: bool, **more: Any) -> Any:
    """The label of a group."""
    return group.teacher_response if not (held_out or more) else (
        {"teacher_response": group.teacher_response, "held_out": held_out} | more
    )  # fmt: skip


def client(monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> Any:
    """gadcore's client, imported anew where its stack is a stand-in."""
    stacks.stand_in(monkeypatch, *names)
    whole = f"gadcore.integrations.{module}"
    if not stacks.installed(names[0].partition(".")[0]):
        monkeypatch.setitem(sys.modules, whole, None)
        del sys.modules[whole]
    return importlib.import_module(whole)


def trl(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    """Two groups in flight in the loop of its asynchronous trainer, which keeps no rewards but their advantages."""
    from accelerate import PartialState
    from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, _AsyncRolloutLoop

    from gadcore.integrations.trl import GADServiceReward

    PartialState()
    tokenizer = tiny_tokenizer()
    reward = GADServiceReward(tokenizer, url=text_rewards.service().url, trains=not held_out)
    found: dict[str, list[float]] = {}

    def kept(**columns: Any) -> list[float]:
        return found.setdefault(columns["teacher_response"][0], reward(**columns))

    loop = _AsyncRolloutLoop.__new__(_AsyncRolloutLoop)
    loop.reward_funcs, loop.reward_func_names, loop._env_reward_types = [kept], ["discriminator"], []

    def drawn(place: int, group: TextGroup) -> Any:
        texts = zip(group.samples, group.finished or (), strict=True)
        return RolloutGroup(
            prompts=[group.messages] * 2, reward_kwargs={"teacher_response": [group.teacher_response] * 2},
            completions=[[{"role": "assistant", "content": "?"}]] * 2,
            completions_ids=[tokenizer(text).input_ids + [END] * ended for text, ended in texts],
            completions_sequences=[[], []], tool_call_counts=[0, 0], tool_failure_counts=[0, 0],
            model_version=0, group_id=place, env_rewards=[], rollout_rewards=[],
        )  # fmt: skip

    async def everything() -> None:
        await asyncio.gather(*(loop._score_group(drawn(place, group)) for place, group in enumerate(GROUPS)))

    asyncio.run(everything())
    return [found[str(group.teacher_response)] for group in GROUPS]


def verl(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    """A sample at a time, all of them in flight."""
    import torch

    where = "verl.experimental.reward_loop.reward_manager"
    module = client(patch, "verl.reward", where, f"{where}.base")
    config = SimpleNamespace(
        reward=SimpleNamespace(num_workers=1), actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(n=2))
    )
    tokenizer = tiny_tokenizer()
    if stacks.installed("verl"):
        from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

        assert get_reward_manager_cls("gadcore") is module.GADRewardManager

    def item(group: TextGroup, place: int) -> Any:
        assert group.finished is not None
        ids = tokenizer(group.samples[place]).input_ids + [END] * group.finished[place]
        seen = torch.ones(1, 3 + len(ids) + 2, dtype=torch.int64)
        seen[0, 3 + len(ids) :] = 0
        columns = {
            "uid": str(group.messages), "raw_prompt": group.messages,
            "reward_model": {"ground_truth": told(group, held_out)},
        }  # fmt: skip
        return protocol(torch.tensor([ids + [END] * 2]), seen, columns)

    async def everything() -> list[Any]:
        manager = module.GADRewardManager(config, tokenizer, None)
        rows = [item(group, place) for group in GROUPS for place in range(2)]
        return await asyncio.gather(*(manager.run_single(row) for row in rows))

    a, b, c, d = (found["reward_score"] for found in asyncio.run(everything()))
    return [[a, b], [c, d]]


def protocol(responses: Any, seen: Any, columns: dict[str, Any]) -> Any:
    """A DataProto of one row, or what the client reads of one."""
    if not stacks.installed("verl"):
        return [SimpleNamespace(batch={"responses": responses[0], "attention_mask": seen[0]}, non_tensor_batch=columns)]
    import numpy as np
    from tensordict import TensorDict
    from verl import DataProto

    arrays = {name: np.empty(1, dtype=object) for name in columns}
    for name, value in columns.items():
        arrays[name][0] = value
    return DataProto(TensorDict({"responses": responses, "attention_mask": seen}, batch_size=1), arrays)


def openrlhf(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    """Prompts rendered by the stack, responses by an engine that has them ready."""
    module = client(patch, "openrlhf", "openrlhf.utils.agent")
    tokenizer = tiny_tokenizer()

    class Engine:
        def __init__(self, group: TextGroup) -> None:
            self.ready = iter(zip(group.samples, group.finished or (), strict=True))

        async def generate(self, ids: list[int], *_: Any, **__: Any) -> Any:
            text, ended = next(self.ready)
            await asyncio.sleep(0.01)
            drawn = tokenizer(text).input_ids + [END] * ended
            output = SimpleNamespace(token_ids=drawn, finish_reason="stop" if ended else "length", logprobs=None)
            return SimpleNamespace(outputs=[output])

    async def prompt(executor: Any, group: TextGroup) -> list[Any]:
        # As its RolloutRayActor.generate_responses does.
        given = (tokenizer.apply_chat_template(group.messages, tokenize=False, add_generation_prompt=True),
                 told(group, held_out, messages=group.messages), SimpleNamespace(max_tokens=8, logprobs=None), 256,
                 tokenizer, Engine(group))  # fmt: skip
        return await asyncio.gather(*(executor.execute(*given) for _ in group.samples))

    async def everything() -> list[Any]:
        executor = module.AgentExecutor()
        return await asyncio.gather(*(prompt(executor, group) for group in GROUPS))

    return [[one["reward"] for one in group] for group in asyncio.run(everything())]


def slime(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    from gadcore.integrations import slime as ours

    async def of_the_batch(arguments: Any, samples: list[Any]) -> list[float]:
        return await ours.reward(arguments, samples)

    async def of_one(arguments: Any, sample: Any) -> float:
        return await ours.reward(arguments, sample)

    kind, batched, single = stacks.SlimeSample, of_the_batch, of_one
    if stacks.installed("slime"):
        kind = importlib.import_module("slime.utils.types").Sample
        hub = importlib.import_module("slime.rollout.rm_hub")
        batched, single = hub.batched_async_rm, hub.async_rm
    arguments = SimpleNamespace(hf_checkpoint=str(model), custom_rm_path="gadcore.integrations.slime.reward")
    samples = [
        kind(
            group_index=number, prompt=group.messages, label=told(group, held_out),
            response=text + "<|im_end|>" * ended, status=kind.Status.COMPLETED if ended else kind.Status.TRUNCATED,
        )
        for number, group in enumerate(GROUPS)
        for text, ended in zip(group.samples, group.finished or (), strict=True)
    ]  # fmt: skip

    async def everything() -> list[float]:
        # With --group-rm it asks for a list, in an evaluation for one sample at a time.
        if held_out:
            return await asyncio.gather(*(single(arguments, sample) for sample in samples))
        return await batched(arguments, samples)

    a, b, c, d = asyncio.run(everything())
    return [[a, b], [c, d]]


def ms_swift(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    client(patch, "swift.plugin", "swift.rewards")
    reward = importlib.import_module("swift.rewards").orms["gadcore"](args=None)
    rows = [
        (group, text, ended)
        for group in GROUPS
        for text, ended in zip(group.samples, group.finished or (), strict=True)
    ]
    # The columns, as its GRPO trainer hands them over.
    a, b, c, d = reward(
        [text for _, text, _ in rows],
        messages=[[*(group.messages or ()), {"role": "assistant", "content": text}] for group, text, _ in rows],
        prompt_id=[str(group.messages) for group, _, _ in rows], is_truncated=[not ended for *_, ended in rows],
        label=[told(group, held_out) for group, _, _ in rows], trainer_state=None, solution=[None] * 4,
    )  # fmt: skip
    return [[a, b], [c, d]]


def verifiers(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    """Two episodes at once, each of as many attempts as a group has samples."""
    module = client(patch, "verifiers", "verifiers.v1", "verifiers.v1.envs.best_of_n")

    class Trace:
        has_error = False

        def __init__(self, text: str, finished: bool) -> None:
            self.last_reply, self.is_truncated = text, not finished

        def record_reward(self, name: str, value: float) -> None:
            assert name == "discriminator"
            self.reward = value

    env = module.GADEnv.__new__(module.GADEnv)
    env.config = module.GADEnvConfig(held_out=held_out) if stacks.installed("verifiers") else SimpleNamespace(
        held_out=held_out
    )  # fmt: skip
    episodes = [[Trace(*one) for one in zip(group.samples, group.finished or (), strict=True)] for group in GROUPS]

    async def everything() -> None:
        await asyncio.gather(
            *(
                env.finalize(
                    SimpleNamespace(
                        data=SimpleNamespace(
                            prompt=(group.messages or ())[0]["content"], system_prompt=None,
                            teacher_response=group.teacher_response,
                        )
                    ),
                    SimpleNamespace(traces=traces),
                )
                for group, traces in zip(GROUPS, episodes, strict=True)
            )
        )  # fmt: skip

    asyncio.run(everything())
    return [[trace.reward for trace in traces] for traces in episodes]


def nemo_rl(patch: pytest.MonkeyPatch, model: Path, held_out: bool) -> list[list[float]]:
    """Both groups in one batch; by its registry and Ray where it is installed."""
    module = client(patch, "nemo_rl", "nemo_rl.environments.interfaces", "ray")
    logs = [
        [*(group.messages or ()), {"role": "assistant", "content": text}] for group in GROUPS for text in group.samples
    ]
    known = [{"label": group.teacher_response} for group in GROUPS for _ in group.samples]
    if stacks.installed("nemo_rl"):
        import ray
        from nemo_rl.environments.utils import ENV_REGISTRY, create_env

        ENV_REGISTRY.pop("gadcore", None)
        module.register()
        ray.init(num_cpus=1, include_dashboard=False)
        try:
            returned = ray.get(create_env("gadcore", {"held_out": held_out}).step.remote(logs, known))
        finally:
            ray.shutdown()
    else:
        returned = module.GADSteps({"held_out": held_out}).step(logs, known)
    a, b, c, d = returned.rewards.tolist()
    return [[a, b], [c, d]]


CALLS: list[Callable[[pytest.MonkeyPatch, Path, bool], list[list[float]]]] = [
    trl, verl, openrlhf, slime, ms_swift, verifiers, nemo_rl
]  # fmt: skip


@pytest.mark.parametrize("held_out", [False, True], ids=["trained", "held out"])
@pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])
def test_a_client_gets_the_services_scores_and_trains_it_once(
    call: Any, held_out: bool, service: ServiceProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text_rewards.service.cache_clear()
    direct = DiscriminatorClient(service.url)
    # NeMo-RL does not tell what was cut.
    groups = [TextGroup(g.samples, g.messages and None, g.messages, g.teacher_response, None,
                        [True, True] if call is nemo_rl else g.finished) for g in GROUPS]  # fmt: skip
    before, expected = direct.health()["version"], direct.score(groups)
    # Elsewhere, so that nothing is found by a path relative to the repository.
    monkeypatch.chdir(tmp_path)
    found = call(monkeypatch, service.folder / "model", held_out)
    text_rewards.service.cache_clear()
    assert direct.health()["version"] == before + (not held_out)
    assert found == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in expected.rewards]
    assert (direct.score(groups).rewards != expected.rewards) is (not held_out)


def test_what_the_service_refuses_reaches_the_stack_as_its_sentence(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GADCORE_TOKEN", "another")
    for call in CALLS:
        if call is nemo_rl and stacks.installed("nemo_rl"):
            continue
        text_rewards.service.cache_clear()
        with pytest.raises(ServiceError, match="token") as refused:
            call(monkeypatch, service.folder / "model", False)
        assert refused.value.status == 401
    text_rewards.service.cache_clear()
