"""D: scores of responses, and its Bradley-Terry step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.config.settings import DiscriminatorSettings
from gadcore.data.groups import Group, GroupedBatch, GroupTokens, micro_batches, select
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.kernels.bt_score import BTScore, bt_score
from gadcore.kernels.layout import GroupLayout
from gadcore.models.activations import Mode, set_mode
from gadcore.models.backbone import cost_of, last_hidden_states, prune_last_layer, use_packed_attention
from gadcore.models.fused import embed_in_place, fuse_backbone
from gadcore.models.optim import Optimizer, autocast


@dataclass(frozen=True)
class Scores:
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
        activation_checkpointing: Mode | Literal["auto"] = "auto",
    ) -> None:
        use_packed_attention(model)
        fuse_backbone(model)
        embed_in_place(model)
        self.model = model
        self.template = template
        self.settings = settings
        self.same_vocabulary = same_vocabulary
        self.micro_batch_tokens = micro_batch_tokens
        self.context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.cost = cost_of(model)
        prune_last_layer(model)
        self.keeps = set_mode(model, activation_checkpointing, micro_batch_tokens)
        self.optimizer = Optimizer(model, settings, lr=settings.lr, owner="discriminator")

    def tokens(self, group: Group) -> GroupTokens:
        """[x | y_t | y_s^1 | ..] in D's own vocabulary.

        Both sides are encoded from text by the same call, with the same end marker: nothing but the text and
        whether it ended by itself can tell teacher from student. So the token ids that a sample was drawn in are never
        taken, not even where they are of the same vocabulary: a text can be written in several ways, of which the
        teacher's is always the tokenizer's own. UserError where prompt and response exceed D's context.
        """
        prompt = group.prompt
        # The student's ids where the vocabulary is shared: a prompt that was truncated stays truncated.
        prompt_ids = prompt.token_ids if self.same_vocabulary else self.template.prompt_ids(prompt.messages)
        responses = tuple(
            tuple(self.template.response_ids(r.text, finished=r.finished)) for r in (group.teacher, *group.samples)
        )
        needed = len(prompt_ids) + max(map(len, responses))
        if self.context_tokens is not None and needed > self.context_tokens:
            raise UserError(
                f"row {prompt.index} of the data (from 0) needs {needed} of the discriminator's tokens, its context "
                f"has {self.context_tokens}: lower data.max_prompt_tokens or data.max_response_tokens (they count the "
                "student's tokens), or choose another discriminator.model"
            )
        return GroupTokens(tuple(prompt_ids), responses)

    def score(self, groups: Sequence[Group], *, backward: bool) -> Scores:
        """Scores every response of the batch in one pass, and with `backward` adds the BT gradient.

        The reward of a sample is the score inside this step's BT loss, so no separate scoring pass is needed;
        the weights do not change until step().
        """
        tokens = [self.tokens(group) for group in groups]
        pairs = sum(len(group.samples) for group in groups)
        rewards = [[0.0] * len(group.samples) for group in groups]
        teachers = [0.0] * len(groups)
        loss = accuracy = margin = 0.0
        for parts in micro_batches(tokens, self.micro_batch_tokens, self.cost, teacher=True):
            with torch.set_grad_enabled(backward):
                result = self._score(select(tokens, parts), denominator=pairs)
            if backward:
                result.loss.backward()
            loss += result.loss.item()
            accuracy += result.accuracy.sum().item() / pairs
            margin += result.margin.sum().item() / pairs
            scores = iter(result.scores.tolist())
            for part in parts:
                teachers[part.group] = next(scores)
                for i in part.responses[1:]:
                    rewards[part.group][i - 1] = next(scores)
        return Scores(rewards, teachers, loss, accuracy, margin, sum(group.tokens for group in tokens))

    def _score(self, groups: Sequence[GroupTokens], denominator: int) -> BTScore:
        batch = GroupedBatch.of(groups, last_tokens=True, device=self.model.device)
        with autocast(self.settings.autocast, self.model.device):
            hidden = last_hidden_states(self.model, batch)
        head: nn.Linear = self.model.score  # type: ignore[assignment]
        layout = GroupLayout.of([len(group.responses) - 1 for group in groups], teacher=True, device=hidden.device)
        result = bt_score(hidden, batch.packed_as, head.weight[0], head.bias, layout, denominator=denominator)
        smoothing, cap = self.settings.label_smoothing, self.settings.margin_cap
        if smoothing == 0 and cap is None:
            return result
        # The op's own loss gets no gradient then; that of its scores is all that is needed.
        return result._replace(loss=softened_bt_loss(result.scores, layout, smoothing, cap) / denominator)

    def step(self) -> float:
        """One optimizer step on the gradient that score() left; returns the gradient norm before clipping."""
        return self.optimizer.step()


def softened_bt_loss(scores: Tensor, groups: GroupLayout, smoothing: float, cap: float | None) -> Tensor:
    """The BT loss with opt-in remedies against a discriminator that wins too clearly, summed over pairs.

        m    = min(D(x, y_t) - D(x, y_s^i), cap)
        loss = (1 - e) softplus(-m) + e softplus(m) = softplus(-m) + e m

    With smoothing e > 0 the loss of a pair is least at the margin log((1 - e) / e), not at infinity. A pair whose
    margin is above the cap gives no gradient. scores: [S], floating, every group's teacher first; groups without one
    form no pairs.
    """
    margin = scores[groups.group_offsets[groups.group_of]] - scores
    if cap is not None:
        margin = margin.clamp(max=cap)
    return (F.softplus(-margin) + smoothing * margin).where(groups.paired, 0.0).sum()
