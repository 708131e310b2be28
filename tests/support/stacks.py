"""The classes of other stacks that gadcore's clients derive from, as their sources have them, where there are none.

OpenRLHF 0.11.2, ms-swift 4.6.0, verifiers 0.4.0, verl 0.9.1 as they are on PyPI; slime 0.3.1 and NeMo-RL 0.6.0 from
their repositories. Names and signatures, nothing of what they do: in an environment that has a stack, its own classes
are taken, and test_stacks.py holds these signatures to them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class SingleTurnAgentExecutor:
    """openrlhf.utils.agent: draws by `llm_engine.generate`."""

    def __init__(self, remote_rm_url: Any = None) -> None:
        assert remote_rm_url is None

    async def execute(
        self, prompt: Any, label: Any, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        prompt_ids = hf_tokenizer(text=prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][0].tolist()
        output = (await llm_engine.generate(prompt_ids, sampling_params, multi_modal_data=None)).outputs[0]
        return {
            "prompt": prompt, "label": label, "observation_tokens": prompt_ids + output.token_ids,
            "action_ranges": [(len(prompt_ids), len(prompt_ids) + len(output.token_ids))],
            "rollout_log_probs": None, "truncated": output.finish_reason == "length", "reward": None, "scores": None,
            "extra_logs": {},
        }  # fmt: skip


class ORM:
    """swift.rewards."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, **kwargs: Any) -> list[float]:
        raise NotImplementedError


@dataclass
class SlimeSample:
    """slime.utils.types.Sample: the fields that the client reads."""

    group_index: int | None = None
    prompt: Any = ""
    response: str = ""
    label: str | None = None

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)


class EnvironmentReturn(NamedTuple):
    """nemo_rl.environments.interfaces."""

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: Any
    terminateds: Any
    answers: list[str | None] | None


class EnvironmentInterface:
    """nemo_rl.environments.interfaces."""

    def step(self, message_log_batch: list[Any], metadata: list[Any]) -> EnvironmentReturn:
        raise NotImplementedError

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        raise NotImplementedError


class Env(Generic[T]):
    """verifiers.v1."""

    def __init__(self, config: Any) -> None:
        self.config = config

    async def finalize(self, task: Any, episode: Any) -> None: ...


class BestOfNEnvConfig:
    n: int = 4
    held_out: bool = False


class BestOfNEnv(Env[BestOfNEnvConfig]):
    """verifiers.v1.envs.best_of_n."""


class RewardManagerBase:
    """verl.experimental.reward_loop.reward_manager.base."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None:
        self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

    async def run_single(self, data: Any) -> dict[str, Any]:
        raise NotImplementedError


MODULES: dict[str, dict[str, Any]] = {
    "openrlhf.utils.agent": {"SingleTurnAgentExecutor": SingleTurnAgentExecutor},
    "swift.rewards": {"ORM": ORM, "orms": {}},
    "nemo_rl.environments.interfaces": {
        "EnvironmentInterface": EnvironmentInterface, "EnvironmentReturn": EnvironmentReturn,
    },
    "ray": {"remote": lambda cls: SimpleNamespace(of=cls)},
    "verl.experimental.reward_loop.reward_manager": {"register": lambda name: lambda cls: cls},
    "verl.experimental.reward_loop.reward_manager.base": {"RewardManagerBase": RewardManagerBase},
    "verifiers.v1": {"Env": Env, "content_text": str},
    "verifiers.v1.envs.best_of_n": {"BestOfNEnv": BestOfNEnv, "BestOfNEnvConfig": BestOfNEnvConfig},
}  # fmt: skip


def installed(stack: str) -> bool:
    known = sys.modules.get(stack)
    return find_spec(stack) is not None if known is None else known.__spec__ is not None


def stand_in(monkeypatch: Any, *names: str) -> None:
    """Puts what is missing of these modules into sys.modules, packages included."""
    for name in names:
        if installed(name.partition(".")[0]):
            continue
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            whole = ".".join(parts[:end])
            if whole not in sys.modules:
                monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
        for key, value in MODULES[name].items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)
