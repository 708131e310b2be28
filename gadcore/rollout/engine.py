"""What a sampler asks of an engine, and the table of engines."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from gadcore.config.functions import load_named
from gadcore.config.rollout import OwnRollout
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.memory.holdings import EnginePart, Holding
from gadcore.rollout.weights import WeightSource

# rollout.engine -> its class, by name: an engine's packages are loaded only where it is used. One of somebody's own is
# named by the setting itself, as "module:class".
ENGINES = {
    "vllm": "gadcore.rollout.vllm:VLLMEngine",
    "vllm-server": "gadcore.rollout.server:ServerEngine",
    "hf": "gadcore.rollout.hf:HFEngine",
}


class WeightsLost(RuntimeError):
    """An engine lost its weights while it sampled, and is there again: after an update it can draw the same samples."""


@dataclass(frozen=True)
class SampleRequest:
    """n samples for one prompt; the seed decides them alone, whatever else is in the batch."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int


Done = Callable[[int, list[Response]], None]


class Pending(ABC):
    """Samples that an engine has begun to draw, see Engine.begin()."""

    @abstractmethod
    def responses(self, places: Sequence[int]) -> list[list[Response]]:
        """Waits for the responses to the requests at these places. Raises WeightsLost as Engine.generate() does."""

    def wait(self) -> None:  # noqa: B027 - mostly all is there already
        """Returns when the engine is not at work for it any more, whatever came of it."""


class Drawn(Pending):
    """Samples that are there already."""

    def __init__(self, responses: Sequence[list[Response]]) -> None:
        self._responses = responses

    def responses(self, places: Sequence[int]) -> list[list[Response]]:
        return [self._responses[place] for place in places]


There = Callable[[], AbstractContextManager[None]]


class Engine(ABC):
    """An engine that holds the policy's weights and samples; gadcore.rollout.sampler knows the order of calls.

    Made as cls(config, model_path, model, template), for `model`, which was loaded from `model_path`; it sleeps at
    first. An engine that has slept has lost its weights, unless they are the trainer's own. As it stands here an engine
    samples from the trainer's own weights and holds nothing for itself.

    shared: generate() computes with the trainer's own weights.
    notes: what a user should know of how it was set up, in sentences.
    """

    # Whether it holds a key-value cache, and perhaps weights, between calls; samples many prompts at once; and can be
    # one sampler over several ranks.
    holds_memory: ClassVar[bool] = False
    batches_prompts: ClassVar[bool] = False
    spans_ranks: ClassVar[bool] = False

    shared: bool = True
    notes: Sequence[str] = ()

    @classmethod
    def make(
        cls,
        config: Config,
        model_path: str,
        model: PreTrainedModel,
        template: ChatTemplate,
        there: There,
        world: World = ALONE,
    ) -> Engine:
        """An engine for a model whose weights are on its device inside the blocks of there(), and may be away outside:
        one that needs much memory can take it before they come.

        world: the processes that train together, the model sharded over them, or whole on each where it has an adapter.
        Each makes the engine and calls it with the same arguments, and each has all responses.
        """
        with there():
            return cls(config, model_path, model, template)  # type: ignore[call-arg]

    @classmethod
    def shares_weights(cls, config: Config, device: str, ranks: int = 1) -> bool:
        """Whether an engine with these settings would be `shared`, on a device of type "cpu" or "cuda"; ranks: of the
        trainer."""
        return True

    @classmethod
    def dtype(cls, config: Config) -> str:
        """The dtype that it computes in: "float32" or "bfloat16"."""
        return config.student.weights_dtype

    @classmethod
    def one_a_process(cls, device: str) -> bool:
        """Whether a process can make only one, even if it closes it, on a device of type "cpu" or "cuda"."""
        return False

    @classmethod
    def samples_elsewhere(cls, config: Config, device: str) -> bool:
        """Whether it samples on devices of its own with these settings, beside a trainer on one of type "cpu" or
        "cuda"."""
        return False

    @abstractmethod
    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int, done: Done | None = None
    ) -> list[list[Response]]:
        """Samples from softmax(logits / temperature), greedily at temperature 0, up to max_tokens tokens.

        Returns per request its n responses, each ended by the template's end marker or cut at max_tokens, with
        the log-probability of every token under the distribution it was drawn from.
        done: called with a request's place in `requests` and its responses as soon as these are there, in any order.
        """

    def begin(self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int) -> Pending:
        """Begins on what generate() returns, and has done it already where the trainer's devices are the engine's.

        While it is under way nothing else is to be asked of the engine but to close; see Pending.wait().
        """
        found = self.generate(requests, temperature=temperature, max_tokens=max_tokens)
        check_responses(self, requests, found, max_tokens)
        return Drawn(found)

    @abstractmethod
    def update_weights(self, source: WeightSource) -> None:
        """From here on generate() computes with the weights of `source`; raises RuntimeError if it would not."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The weights that generate() computes with, under the trainer's parameter names (no copies)."""

    def sleep(self) -> None:  # noqa: B027 - most engines hold nothing
        """Gives back the memory that only sampling needs, for an engine that sleeps already without effect."""

    def wake(self, part: EnginePart) -> None:  # noqa: B027
        """Takes the memory of a part again, for one that is awake without effect."""

    def held(self) -> dict[Holding, int]:
        """Bytes of the device that the engine holds for itself now."""
        return {}

    def aliases(self) -> list[Tensor]:
        """The engine's own tensors that look at the trainer's weights."""
        return []

    def close(self) -> None:  # noqa: B027
        """Ends the engine; it cannot be used any more."""


def check_responses(engine: Engine, requests: Sequence[SampleRequest], responses: Any, max_tokens: int) -> None:
    """Raises UserError where these are not what generate() is to return: told here, by the engine's name, what would
    end a step far away, or train on what nobody drew."""
    lists = responses if isinstance(responses, Sequence) else ()
    if len(lists) != len(requests):
        _refuse(engine, f"must return a list of responses to each of {len(requests)} requests: got {len(lists)}")
    for request, found in zip(requests, lists, strict=True):
        if not isinstance(found, Sequence) or len(found) != request.n:
            _refuse(engine, f"must return {request.n} responses to a request: got {str(found)[:80]}")
    for response in (response for found in lists for response in found):
        if not isinstance(response, Response):
            _refuse(engine, f"must return gadcore.data.groups.Response: got {type(response).__name__}")
        ids = response.token_ids
        if not isinstance(ids, tuple) or not 0 < len(ids) <= max_tokens:
            _refuse(engine, f"must return a tuple of 1 to {max_tokens} token ids a response: got {str(ids)[:80]}")
        if len(response.logprobs) != len(ids):
            _refuse(engine, f"must return a log-prob for each of {len(ids)} tokens: got {len(response.logprobs)}")


def _refuse(engine: Engine, rule: str) -> NoReturn:
    raise UserError(f"the engine {type(engine).__name__} {rule}; see gadcore.rollout.engine.Engine.generate()")


def engine_class(config: Config) -> type[Engine]:
    """The class of the engine that rollout.engine names. Raises UserError where there is no such class."""
    name = config.rollout.engine
    if name in ENGINES:
        module, _, attribute = ENGINES[name].partition(":")
        shipped: type[Engine] = getattr(importlib.import_module(module), attribute)
        return shipped
    found: type[Engine] = load_named(name, "rollout.engine", "class")
    if not issubclass(found, Engine):
        raise UserError(f"rollout.engine = {name!r} must be a class on gadcore.rollout.engine.Engine, and is none")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"rollout.engine = {name!r} lacks {', '.join(missing)} of gadcore.rollout.engine.Engine")
    return found


def check_own_engine(config: Config, processes: int) -> None:
    """Raises UserError where an engine of one's own cannot be made, before a model is loaded for it. processes: that
    train together."""
    if isinstance(config.rollout, OwnRollout) and not engine_class(config).spans_ranks and processes > 1:
        raise UserError(_of_one_process(config, processes))


def _of_one_process(config: Config, processes: int) -> str:
    return (
        f'rollout.engine = "{config.rollout.engine}" samples in one process, and {processes} train together: take '
        '"vllm" or "hf", or start one process'
    )


def make_engine(
    config: Config,
    model_path: str,
    model: PreTrainedModel,
    template: ChatTemplate,
    there: There = nullcontext,
    world: World = ALONE,
) -> Engine:
    """The engine that rollout.engine names, for `model`, which was loaded from `model_path`. It sleeps at first.

    there, world: see Engine.make(). Raises UserError where the engine cannot run the model, has no room on the device,
    or samples on one process alone.
    """
    found = engine_class(config)
    if world.size == 1:
        return found.make(config, model_path, model, template, there)
    if not found.spans_ranks:
        raise UserError(_of_one_process(config, world.size))
    return found.make(config, model_path, model, template, there, world)
