"""G: log-probs of the student, its SeqKD step and its GRPO step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.config.settings import AlgorithmSettings, StudentSettings
from gadcore.data.groups import Group, GroupedBatch, GroupTokens, micro_batches, select
from gadcore.kernels.grpo_ratio_loss import group_advantages
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.kernels.linear_logprob import linear_logprob
from gadcore.models.activations import Mode, set_mode
from gadcore.models.backbone import cost_of, predicting_states, prune_last_layer, use_packed_attention
from gadcore.models.fused import embed_in_place, fuse_backbone, gradient_in_place
from gadcore.models.optim import Optimizer, autocast


@dataclass(frozen=True)
class PolicyStats:
    """What a GRPO pass found: per-token means over the batch, except *_max; tokens processed."""

    loss: float
    kl: float
    entropy: float
    clip_fraction: float
    ratio_max: float
    logprob_diff_mean: float
    logprob_diff_max: float
    tokens: int


@dataclass(frozen=True)
class SeqKDStats:
    """What a SeqKD pass found: cross-entropy per token, tokens processed."""

    ce: float
    tokens: int


class Student:
    """The policy pi_G, and from freeze_reference() on the reference policy."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: StudentSettings,
        algorithm: AlgorithmSettings,
        *,
        temperature: float,
        micro_batch_tokens: int,
        activation_checkpointing: Mode | Literal["auto"] = "auto",
    ) -> None:
        use_packed_attention(model)
        fuse_backbone(model)
        embed_in_place(model)
        prune_last_layer(model)
        self.model = model
        self.reference: PreTrainedModel | None = None
        self.settings = settings
        self.algorithm = algorithm
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.cost = cost_of(model)
        self.keeps = set_mode(model, activation_checkpointing, micro_batch_tokens)
        self.optimizer = Optimizer(model, settings, lr=settings.lr, owner="student")

    def freeze_reference(self) -> None:
        """Makes the student as it is now the reference policy; none is kept where no KL is asked for."""
        if self.algorithm.kl_coef > 0:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def predicting_states(self, model: PreTrainedModel, batch: GroupedBatch) -> Tensor:
        """Last hidden states [R, H] of the tokens that predict the response tokens of the batch."""
        with autocast(self.settings.autocast, model.device):
            return predicting_states(model, batch)

    def logprobs(self, model: PreTrainedModel, batch: GroupedBatch, temperature: float) -> Tensor:
        """Log-probs [R] of all response tokens under softmax(logits / temperature), in fp32."""
        hidden, head = self.predicting_states(model, batch), model.get_output_embeddings()
        with autocast(self.settings.autocast, model.device):
            return linear_logprob(hidden, head.weight, batch.targets, bias=head.bias, temperature=temperature)

    def seqkd_backward(self, groups: Sequence[Group]) -> SeqKDStats:
        """Adds the gradient of the cross-entropy on the teacher's responses, a global token mean over the batch."""
        tokens = [GroupTokens(group.prompt.token_ids, (group.teacher.token_ids,)) for group in groups]
        response_tokens = sum(len(group.teacher.token_ids) for group in groups)
        ce = 0.0
        for parts in micro_batches(tokens, self.micro_batch_tokens, self.cost, teacher=False):
            batch = GroupedBatch.of(select(tokens, parts), last_tokens=False, device=self.model.device)
            logprob = self.logprobs(self.model, batch, self.algorithm.sft_temperature)
            loss = -logprob.sum() / response_tokens
            loss.backward()
            ce += loss.item()
        return SeqKDStats(ce, sum(group.tokens for group in tokens))

    def grpo_backward(self, groups: Sequence[Group], rewards: Sequence[Sequence[float]]) -> PolicyStats:
        """Adds the gradient of the GRPO loss on the samples of the batch; rewards[g][i] is of groups[g].samples[i].

        The batch gets exactly one optimizer step, so the old policy is the policy itself and no pass for old
        log-probs is needed (kernels/grpo_ratio_loss.py).
        """
        algorithm = self.algorithm
        tokens = [GroupTokens(group.prompt.token_ids, tuple(s.token_ids for s in group.samples)) for group in groups]
        advantages = self.advantages(rewards)
        response_tokens = sum(len(sample.token_ids) for group in groups for sample in group.samples)
        loss = kl = entropy = clipped = diff = ratio_max = diff_max = 0.0
        for parts in micro_batches(tokens, self.micro_batch_tokens, self.cost, teacher=False):
            batch = GroupedBatch.of(select(tokens, parts), last_tokens=False, device=self.model.device)
            ref_logprob = None
            if self.reference is not None:
                with torch.no_grad():
                    ref_logprob = self.logprobs(self.reference, batch, self.temperature)
            hidden, head = self.predicting_states(self.model, batch), self.model.get_output_embeddings()
            with autocast(self.settings.autocast, self.model.device):
                result = linear_grpo_loss(
                    hidden,
                    head.weight,
                    batch.targets,
                    GroupLayout.of(
                        [len(part.responses) for part in parts],
                        teacher=False,
                        lengths=batch.lengths,
                        device=hidden.device,
                    ),
                    bias=head.bias,
                    # Known for the whole batch, so a cut may separate the samples of a group.
                    advantages=torch.cat([advantages[p.group][list(p.responses)] for p in parts]).to(hidden.device),
                    ref_logprob=ref_logprob,
                    temperature=self.temperature,
                    clip_low=algorithm.clip_low,
                    clip_high=algorithm.clip_high,
                    kl_coef=algorithm.kl_coef,
                    denominator=response_tokens,
                    return_entropy=True,
                    add_weight_gradient_to=gradient_in_place(head.weight, self.settings.autocast),
                )
            result.loss.backward()
            samples = [groups[part.group].samples[i] for part in parts for i in part.responses]
            sampled = torch.tensor([logprob for sample in samples for logprob in sample.logprobs])
            metrics = result.metrics
            difference = (metrics.logprob.cpu() - sampled).abs()
            loss += result.loss.item()
            kl += metrics.kl_sum.item() / response_tokens
            entropy += metrics.entropy_sum.item() / response_tokens
            clipped += metrics.clipped_sum.item() / response_tokens
            ratio_max = max(ratio_max, metrics.ratio_max.item())
            diff += difference.sum().item() / response_tokens
            diff_max = max(diff_max, difference.max().item())
        return PolicyStats(loss, kl, entropy, clipped, ratio_max, diff, diff_max, sum(group.tokens for group in tokens))

    def advantages(self, rewards: Sequence[Sequence[float]]) -> list[Tensor]:
        """A_i = (r_i - mean r) / (std r + floor) over each group, unbiased std; undivided where that is asked for.

        One float64 tensor a group. The floor is algorithm.advantage_std_floor: the paper's 1e-6 only avoids 0 / 0, one
        of the size of a usual std keeps groups whose rewards hardly differ from being blown up to full advantages.
        """
        sizes = [len(group) for group in rewards]
        advantages = group_advantages(
            torch.tensor([r for group in rewards for r in group], dtype=torch.float64),
            GroupLayout.of(sizes, teacher=False),
            normalise=self.algorithm.normalise_advantage,
            std_floor=self.algorithm.advantage_std_floor,
        )
        return list(advantages.split(sizes))

    def step(self, lr: float) -> float:
        """One optimizer step on the gradient that is there; returns its norm before clipping."""
        self.optimizer.set_lr(lr)
        return self.optimizer.step()
