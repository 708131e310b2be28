"""rollout.ahead = 1: while a batch is learned from, the next one is sampled with the weights from before its update.

    step k    the samples of k are there, of weights w(k-2)      a stage's first step: drawn now, of w(k-1)
              the sampler gets w(k-1), and begins on those of k+1
              D and the student learn from those of k, the student by importance weights: w(k)

So samples are one step old, and never more. What is on its way as a checkpoint is written is waited for and goes into
it: the weights that draw it are gone by then, and keeping them would take another copy of the student, there and in
memory. A resumed run has the same samples for it, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gadcore.config.device import device_of
from gadcore.config.settings import Config
from gadcore.data.batches import Loader
from gadcore.data.groups import Group, Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.rollout.engine import Drawn, Pending, WeightsLost, engine_class
from gadcore.rollout.sampler import Sampler
from gadcore.train.drawing import Drawing, InParts


def check_elsewhere(config: Config) -> None:
    """Raises UserError where settings are of use beside a sampler with devices of its own alone, and there is none."""
    rollout = config.rollout
    ahead = rollout.ahead and not rollout.ahead_by_turns
    if not (ahead or rollout.parts > 1):
        return
    if engine_class(config).samples_elsewhere(config, device_of(config).type):
        return
    asked, off = f"rollout.parts = {rollout.parts}", "rollout.parts = 1"
    if ahead:
        asked = "rollout.ahead = 1"
        off = "rollout.ahead = 0; with rollout.ahead_by_turns = true it does so all the same"
    raise UserError(
        f'{asked} samples while the trainer computes, and rollout.engine = "{rollout.engine}" has the trainer\'s '
        f'devices here: take "vllm-server" with a server on devices of its own (rollout.url), or {off}'
    )


def drawing_of(
    config: Config,
    sampler: Sampler,
    loader: Loader,
    template: ChatTemplate | None,
    say: Callable[[str], None],
) -> Drawing:
    """How a run with these settings draws its samples; arguments as of Ahead and InParts."""
    rollout = config.rollout
    if rollout.ahead:
        return Ahead(sampler, rollout.group_size, loader, template, say)
    if rollout.parts > 1:
        return InParts(sampler, rollout.group_size, rollout.parts, say)
    return Drawing(sampler, rollout.group_size)


@dataclass(frozen=True)
class _Batch:
    """Samples on their way. purpose: as of Sampler.draw(). indices: of the prompts."""

    purpose: str
    indices: list[int]
    pending: Pending

    def is_for(self, groups: Sequence[Group], purpose: str) -> bool:
        return self.purpose == purpose and self.indices == [group.prompt.index for group in groups]


class Ahead(Drawing):
    """Draws the samples of every step of a stage, and begins on those of the next one.

    staleness: steps by which the weights that drew the present batch are older than those that learn from it, 0 or 1.
    """

    meanwhile = True

    def __init__(
        self, sampler: Sampler, samples: int, loader: Loader, template: ChatTemplate | None, say: Callable[[str], None]
    ) -> None:
        """loader: its next batch is that of the next step. template: of the student. say: is told where samples are
        drawn anew."""
        super().__init__(sampler, samples)
        self._loader, self._template, self._say = loader, template, say
        self._batch: _Batch | None = None
        self.staleness = 0

    def draw(self, groups: Sequence[Group], stage: str, step: int, *, last: bool) -> None:
        batch, self._batch = self._batch, None
        purpose = f"{stage}/{step}"
        self.staleness = 0
        if batch is not None and batch.is_for(groups, purpose):
            try:
                responses = self._sampler.awaited(batch.pending, range(len(groups)))
                self._sampler.give(groups, responses)
                self.staleness = 1
            except WeightsLost as error:
                self._told(error)
        if not self.staleness:
            super().draw(groups, stage, step, last=last)
        if not last:
            following, purpose = self._loader.batch(self._loader.epoch, self._loader.position), f"{stage}/{step + 1}"
            pending = self._sampler.begin(following, self._samples, purpose)
            self._batch = _Batch(purpose, [group.prompt.index for group in following], pending)

    def figures(self) -> dict[str, float]:
        return {"sampler/staleness": self.staleness}

    def drop(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.pending.wait()

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """As of Drawing: the batch on its way, when it is there.

        ids: int64 tokens of all samples, logprobs: float64 of them, lengths: int64 of every sample.
        """
        if self._batch is None:
            return None
        count = len(self._batch.indices)
        try:
            drawn = self._batch.pending.responses(range(count))
        except WeightsLost as error:
            self._batch = None
            self._told(error)
            return None
        samples = [sample for responses in drawn for sample in responses]
        tensors = {
            "ids": torch.tensor([token for sample in samples for token in sample.token_ids], dtype=torch.int64),
            "logprobs": torch.tensor([p for sample in samples for p in sample.logprobs], dtype=torch.float64),
            "lengths": torch.tensor([len(sample.token_ids) for sample in samples], dtype=torch.int64),
        }
        return tensors, {"purpose": self._batch.purpose, "indices": self._batch.indices}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        assert self._template is not None
        lengths = tensors["lengths"].tolist()
        samples = []
        for ids, logprobs in zip(tensors["ids"].split(lengths), tensors["logprobs"].split(lengths), strict=True):
            tokens = tuple(ids.tolist())
            text, finished = self._template.text_of(tokens)
            samples.append(Response(text, tokens, finished, tuple(logprobs.tolist())))
        each = len(samples) // len(state["indices"])
        drawn = [samples[start : start + each] for start in range(0, len(samples), each)]
        self._batch = _Batch(state["purpose"], state["indices"], Drawn(drawn))

    def _told(self, error: WeightsLost) -> None:
        self._say(f"{error}: its batch is drawn anew, by the weights as they are now (sampler/staleness 0)")
