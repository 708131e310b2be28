"""What the algorithm asks of a sampler."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.memory.colocation import Part
from gadcore.memory.holdings import Holding


@dataclass(frozen=True)
class SampleRequest:
    """n samples for one prompt; the seed decides them alone, whatever else is in the batch."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int


class Engine(Protocol):
    """A sampler that holds the student's weights.

    The order of a step is wake("weights") -> update_weights -> wake("kv_cache") -> generate -> sleep -> (training).
    An engine that has slept has lost its weights, unless they are the trainer's own.

    shared: generate() computes with the trainer's own weights.
    """

    shared: bool

    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int
    ) -> list[list[Response]]:
        """Samples from softmax(logits / temperature), greedily at temperature 0, up to max_tokens tokens.

        Returns per request its n responses, each ended by the template's end marker or cut at max_tokens, with
        the log-probability of every token under the distribution it was drawn from.
        """
        ...

    def update_weights(self, model: PreTrainedModel) -> None:
        """From here on generate() computes with the weights of `model`; raises RuntimeError if it would not."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The weights that generate() computes with, under the trainer's parameter names (no copies)."""
        ...

    def sleep(self) -> None:
        """Gives back the memory that only sampling needs, for an engine that sleeps already without effect."""
        ...

    def wake(self, part: Part) -> None:
        """Takes the memory of a part again, for one that is awake without effect."""
        ...

    def held(self) -> dict[Holding, int]:
        """Bytes of the device that the engine holds for itself now."""
        ...

    def aliases(self) -> list[Tensor]:
        """The engine's own tensors that look at the trainer's weights."""
        ...

    def close(self) -> None:
        """Ends the engine; it cannot be used any more."""
        ...


# rollout.engine -> its class. By name: an engine's packages are loaded only where it is used.
ENGINES = {"vllm": "gadcore.rollout.vllm:VLLMEngine", "hf": "gadcore.rollout.hf:HFEngine"}


def make_engine(config: Config, model_path: str, model: PreTrainedModel, template: ChatTemplate) -> Engine:
    """The engine that rollout.engine names, for `model`, which was loaded from `model_path`. It sleeps at first."""
    module, _, name = ENGINES[config.rollout.engine].partition(":")
    made: Engine = getattr(importlib.import_module(module), name)(config, model_path, model, template)
    return made


def wake_with(engine: Engine, model: PreTrainedModel) -> None:
    """Wakes a sleeping engine, as every engine is at first, with the weights of `model`: it can sample then."""
    engine.wake("weights")
    engine.update_weights(model)
    engine.wake("kv_cache")


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A checksum over the bits of named weights, the same in whatever order and storage they come.

    Takes the tensors one by one, so they may be made on the way. Built from sums over rows: it sees rows that differ or
    were exchanged, but not two columns exchanged everywhere.
    """
    total = 0
    for name, tensor in weights:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        rows = tensor.detach().view(integer).reshape(len(tensor), -1).sum(1, dtype=torch.int64)
        numbers = torch.arange(1, len(rows) + 1, device=rows.device)
        total += xxhash.xxh3_128_intdigest(f"{name} {int(rows.sum())} {int((rows * numbers).sum())}".encode())
    return total % 2**128
