"""D: scores of responses, and its Bradley-Terry step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from gadcore.config import DiscriminatorSettings
from gadcore.groups import Group, Row, collate, micro_batches
from gadcore.kernels.bt_score import BTScore, bt_score
from gadcore.kernels.layout import GroupLayout
from gadcore.models import backbone_hidden
from gadcore.optim import Optimizer, autocast
from gadcore.template import ChatTemplate


@dataclass(frozen=True)
class Judgement:
    """What one discriminator pass over a batch found.

    rewards: per group, D(x, y_s^i) of its samples, under the weights before this step's update.
    teacher_scores: per group, D(x, y_t).
    loss: the BT loss. accuracy, margin: means over all pairs.
    tokens: tokens that went through the model.
    """

    rewards: list[list[float]]
    teacher_scores: list[float]
    loss: float
    accuracy: float
    margin: float
    tokens: int


class Discriminator:
    """A language model with a scalar head, D(x, y) = w . h_last + b."""

    def __init__(
        self,
        model: PreTrainedModel,
        template: ChatTemplate,
        settings: DiscriminatorSettings,
        *,
        same_vocabulary: bool,
        micro_batch_tokens: int,
    ) -> None:
        self.model = model
        self.template = template
        self.settings = settings
        self.same_vocabulary = same_vocabulary
        self.micro_batch_tokens = micro_batch_tokens
        self.optimizer = Optimizer(model, settings, lr=settings.lr, owner="discriminator")

    def rows(self, group: Group) -> list[Row]:
        """[x | y_t], [x | y_s^1], .. in D's own vocabulary.

        Both sides are encoded from text by the same call, with the same end marker: nothing but the text and
        whether it ended by itself can tell teacher from student.
        """
        prompt = group.prompt
        # The student's ids where the vocabulary is shared: a prompt that was truncated stays truncated.
        prompt_ids = prompt.token_ids if self.same_vocabulary else self.template.prompt_ids(prompt.messages)
        return [
            Row(prompt_ids, self.template.response_ids(r.text, finished=r.finished))
            for r in (group.teacher, *group.samples)
        ]

    def judge(self, groups: Sequence[Group], *, backward: bool) -> Judgement:
        """Scores every response of the batch in one pass, and with `backward` adds the BT gradient.

        The reward of a sample is the score inside this step's BT loss, so no separate scoring pass is needed;
        the weights do not change until step().
        """
        rows = [self.rows(group) for group in groups]
        pairs = sum(len(group.samples) for group in groups)
        sizes = [(len(r), max(map(len, r))) for r in rows]
        rewards: list[list[float]] = []
        teachers: list[float] = []
        loss = accuracy = margin = 0.0
        for cut in micro_batches(sizes, self.micro_batch_tokens):
            with torch.set_grad_enabled(backward):
                result = self._score([rows[i] for i in cut], denominator=pairs)
            if backward:
                result.loss.backward()
            loss += result.loss.item()
            accuracy += result.accuracy.sum().item() / pairs
            margin += result.margin.sum().item() / pairs
            scores = iter(result.scores.tolist())
            for i in cut:
                teachers.append(next(scores))
                rewards.append([next(scores) for _ in groups[i].samples])
        tokens = sum(len(row) for group_rows in rows for row in group_rows)
        return Judgement(rewards, teachers, loss, accuracy, margin, tokens)

    def _score(self, rows: Sequence[Sequence[Row]], denominator: int) -> BTScore:
        batch = collate([row for group in rows for row in group], self.template.end_id, self.model.device)
        with autocast(self.settings.autocast, self.model.device):
            hidden = backbone_hidden(self.model, batch.input_ids)
        head: nn.Linear = self.model.score  # type: ignore[assignment]
        layout = GroupLayout.of([len(group) - 1 for group in rows], teacher=True, device=self.model.device)
        return bt_score(
            hidden.flatten(0, 1), batch.last_index, head.weight[0], head.bias, layout, denominator=denominator
        )

    def step(self) -> float:
        """One optimizer step on the gradient that judge() left; returns the gradient norm before clipping."""
        return self.optimizer.step()
