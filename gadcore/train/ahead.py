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


def check_ahead(config: Config) -> None:
    """Raises UserError where samples would be one step old for nothing, and nobody has said so."""
    rollout = config.rollout
    if not rollout.ahead or rollout.ahead_by_turns:
        return
    if engine_class(config).samples_elsewhere(config, device_of(config).type):
        return
    raise UserError(
        f'rollout.ahead = 1 samples while the trainer computes, and rollout.engine = "{rollout.engine}" has the '
        'trainer\'s devices here: take "vllm-server" with a server on devices of its own (rollout.url), or '
        "rollout.ahead = 0; rollout.ahead_by_turns = true samples ahead all the same, by turns"
    )


@dataclass(frozen=True)
class _Batch:
    """Samples on their way. purpose: as of Sampler.draw(). indices: of the prompts."""

    purpose: str
    indices: list[int]
    pending: Pending

    def is_for(self, groups: Sequence[Group], purpose: str) -> bool:
        return self.purpose == purpose and self.indices == [group.prompt.index for group in groups]


class Ahead:
    """Draws the samples of every step of a stage, and begins on those of the next one.

    staleness: steps by which the weights that drew the present batch are older than those that learn from it, 0 or 1.
    """

    def __init__(
        self, sampler: Sampler, loader: Loader, template: ChatTemplate | None, samples: int, say: Callable[[str], None]
    ) -> None:
        """loader: its next batch is that of the next step. template: of the student. samples: of a prompt. say: is told
        where samples are drawn anew."""
        self._sampler, self._loader, self._template, self._samples, self._say = sampler, loader, template, samples, say
        self._batch: _Batch | None = None
        self.staleness = 0

    def draw(self, groups: Sequence[Group], stage: str, step: int, *, last: bool) -> None:
        """Gives every group of a step its samples; last: of its stage, so that nothing is drawn ahead."""
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
            self._sampler.draw(groups, self._samples, purpose)
        if not last:
            following, purpose = self._loader.batch(self._loader.epoch, self._loader.position), f"{stage}/{step + 1}"
            pending = self._sampler.begin(following, self._samples, purpose)
            self._batch = _Batch(purpose, [group.prompt.index for group in following], pending)

    def drop(self) -> None:
        """Forgets what was drawn ahead: no step will come that learns from it."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.pending.wait()

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a checkpoint keeps of the batch on its way, tensors and JSON; None where there is none.

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
        """Goes on with what saved() gave."""
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
