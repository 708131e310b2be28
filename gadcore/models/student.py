"""G: log-probs of the student, its SeqKD pass and its GRPO pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gadcore.config.adapter import lora_of
from gadcore.config.device import best_device
from gadcore.config.functions import load_named
from gadcore.config.settings import AlgorithmSettings, StudentSettings
from gadcore.data.groups import Group, GroupedBatch, GroupTokens, MicroBatch
from gadcore.data.template import ChatTemplate
from gadcore.distributed import fsdp
from gadcore.distributed.world import ALONE, World
from gadcore.kernels.grpo_ratio_loss import GRPOLoss, group_advantages
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_logprob import linear_logprob
from gadcore.models.activations import Mode
from gadcore.models.backbone import predicting_states
from gadcore.models.checks import check_head
from gadcore.models.fused import gradient_in_place
from gadcore.models.learner import Learner, memory_of
from gadcore.models.loading import load_causal_lm
from gadcore.models.policy_loss import LossInputs, PolicyLoss, by_function, fused
from gadcore.models.policy_stats import FAR, SUMS, PolicyStats, SeqKDStats
from gadcore.models.precision import autocast
from gadcore.models.readout import together
from gadcore.models.reference import frozen_copy
from gadcore.models.shared_base import SharedBase
from gadcore.models.spec import ModelSpec
from gadcore.models.text_groups import Messages, ready, text_group

# Of every sample its reward: [S] over all samples, group after group, or a list a group.
Rewards = Tensor | Sequence[Sequence[float]]


class Student(Learner):
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
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: ChatTemplate | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        world: World = ALONE,
    ) -> None:
        """model: checked as load_causal_lm() does. temperature: of sampling, and so of the log-probs.
        template: by which group() encodes text. optimizer: as of wrap().
        """
        super().__init__(
            model,
            settings,
            owner="student",
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=activation_checkpointing,
            tokenizer=tokenizer,
            optimizer=optimizer,
            world=world,
        )
        self.template = template
        self.reference: PreTrainedModel | None = None
        # What load() has put the adapter on, for a discriminator to share.
        self.base: SharedBase | None = None
        self.settings = settings
        self.algorithm = algorithm
        self.temperature = temperature
        self._loss: PolicyLoss | None = None
        if algorithm.loss is not None:
            self._loss = load_named(algorithm.loss, "algorithm.loss")

    @classmethod
    def load(
        cls,
        model: str | ModelSpec,
        settings: StudentSettings | None = None,
        algorithm: AlgorithmSettings | None = None,
        *,
        device: torch.device | str | None = None,
        seed: int = 0,
        temperature: float = 0.8,
        micro_batch_tokens: int = 16384,
        activation_checkpointing: Mode | Literal["auto"] = "auto",
        world: World = ALONE,
    ) -> Student:
        """The student from a model directory, a hub id or a bundled name.

        settings, algorithm: default the paper's. device: default the GPU where there is one. seed: of a new adapter.
        world: of several processes, each of which reads its shards alone, or all of the base of an adapter.
        Raises UserError where there is no such model, or where it does not fit packed groups.
        """
        spec = ModelSpec.resolve(model) if isinstance(model, str) else model
        settings = settings or StudentSettings()
        device = best_device() if device is None else torch.device(device)
        base = None
        if lora_of(settings) is not None:
            base = SharedBase.load(spec, settings, device, world)
            loaded = base.policy(settings, seed=seed, world=world)
        else:
            loaded = load_causal_lm(spec.path, settings.dtype, device, world)
        made = cls(
            loaded,
            settings,
            algorithm or AlgorithmSettings(),
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=activation_checkpointing,
            tokenizer=spec.tokenizer,
            template=spec.template,
            world=world,
        )
        made.base = base
        return made

    def freeze_reference(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Makes the student as it is now the reference policy; none is kept where no KL is asked for.

        The frozen base under an adapter is the student's own, and the reference a copy of the adapter. What autocast
        rounds in every pass is kept in its dtype: the same log-probs to the bit from half the memory.
        values: of the student's parameters by their names, where they wait elsewhere; default those of the model. Of
        a sharded one they are this process's rows (local_parameters()), and so is what the reference holds.
        """
        if self.algorithm.kl_coef <= 0:
            return
        self.reference = frozen_copy(self.model, self.settings.autocast, values, self.world)

    def reference_tensors(self) -> list[Tensor]:
        """As parameter_tensors(), of the reference policy, which there must be."""
        assert self.reference is not None
        return memory_of(self.reference)

    def predicting_states(self, model: PreTrainedModel, batch: GroupedBatch) -> Tensor:
        """Last hidden states [R, H] of the tokens that predict the response tokens of the batch.

        Of a sharded model inside its forward alone (gadcore.distributed.fsdp.inside).
        """
        with autocast(self.settings.autocast, model.device):
            return predicting_states(model, batch)

    def logprobs(self, model: PreTrainedModel, batch: GroupedBatch, temperature: float) -> Tensor:
        """Log-probs [R] of all response tokens under softmax(logits / temperature), in fp32."""
        return fsdp.inside(model, lambda: self._logprobs(model, batch, temperature))

    def _logprobs(self, model: PreTrainedModel, batch: GroupedBatch, temperature: float) -> Tensor:
        hidden, head = self.predicting_states(model, batch), model.get_output_embeddings()
        with autocast(self.settings.autocast, model.device):
            return linear_logprob(hidden, head.weight, batch.targets, bias=head.bias, temperature=temperature)

    def take_part(self, micro: MicroBatch) -> None:
        """Gathers and adds up together with the others, where this process has nothing to do: a gradient of 0."""
        (self.logprobs(self.model, micro.tokens, self.temperature).sum() * 0.0).backward()

    def seqkd_backward(self, groups: Sequence[Group]) -> SeqKDStats:
        """Adds the gradient of the cross-entropy on the teacher's responses, a global token mean over the batch."""
        tokens = [GroupTokens(group.prompt.token_ids, (group.teacher.token_ids,)) for group in groups]
        response_tokens = sum(len(group.teacher.token_ids) for group in groups)
        ce = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for micro in self.packed(tokens, teacher=False):
            if micro.idle:
                self.take_part(micro)
                continue
            result = fsdp.inside(self.model, partial(self._cross_entropy, micro, response_tokens))
            result.loss.backward()
            ce -= result.metrics.logprob.sum(dtype=torch.float64) / response_tokens
        figures, _ = together(self.world, {"ce": ce}, {})
        return self.later(SeqKDStats(figures, tokens=sum(group.tokens for group in tokens)))

    def _cross_entropy(self, micro: MicroBatch, denominator: int) -> GRPOLoss:
        """What has the gradient of the cross-entropy: the policy loss with an advantage of 1 and no KL, whose ratio to
        the policy itself is 1. Its op makes gradients in its one pass over the tokens, by three products of the head in
        place of the four of log-probs whose gradient is known only afterwards.

        Inside the model's forward.
        """
        advantages = torch.ones(len(micro.index), device=self.model.device)
        return self._fused_loss(micro, advantages, denominator, temperature=self.algorithm.sft_temperature, kl_coef=0.0)

    @torch.no_grad()
    def cross_entropy(self, groups: Sequence[Group]) -> float:
        """What seqkd_backward() takes the gradient of, in nats, of groups of any number: no gradient is made."""
        tokens = [GroupTokens(group.prompt.token_ids, (group.teacher.token_ids,)) for group in groups]
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for micro in self.packed(tokens, teacher=False):
            logprob = self.logprobs(self.model, micro.tokens, self.algorithm.sft_temperature)
            total -= 0.0 if micro.idle else logprob.sum()
        figures, _ = together(self.world, {"ce": total / sum(len(group.teacher.token_ids) for group in groups)}, {})
        return float(figures["ce"])

    @torch.no_grad()
    def reference_logprobs(self, groups: Sequence[Group]) -> Tensor | None:
        """Log-probs [R] of all sampled tokens of the batch under the reference policy, on the device, in fp32 (fp64 of
        an fp64 model), in the order in which grpo_backward() packs them; None where there is no reference policy.

        Of several processes each has those of its own micro-batches, which nobody else needs.
        """
        if self.reference is None:
            return None
        found = []
        for micro in self.packed(_sampled(groups), teacher=False):
            logprob = self.logprobs(self.reference, micro.tokens, self.temperature)
            found.append(logprob[:0] if micro.idle else logprob)
        return torch.cat(found)

    def grpo_backward(
        self, groups: Sequence[Group], rewards: Rewards, ref_logprob: Tensor | None = None
    ) -> PolicyStats:
        """Adds the gradient of the GRPO loss on the samples of the batch.

        The batch gets exactly one optimizer step, so the old policy is the policy itself and no pass for old
        log-probs is needed (kernels/grpo_ratio_loss.py).
        ref_logprob: reference_logprobs(groups), for whoever wants the reference policy away by now; default made here.
        """
        if ref_logprob is None:
            ref_logprob = self.reference_logprobs(groups)
        tokens = _sampled(groups)
        device = self.model.device
        # Known for the whole batch, so that a cut may separate the samples of a group.
        advantages = self.advantages(rewards, [len(group.samples) for group in groups]).to(device)
        samples = [sample for group in groups for sample in group.samples]
        response_tokens = sum(len(sample.token_ids) for sample in samples)
        if ref_logprob is not None and self.world.size == 1 and len(ref_logprob) != response_tokens:
            raise ValueError(f"the batch has {response_tokens} sampled tokens, ref_logprob {len(ref_logprob)}")
        done = 0
        zero = torch.zeros((), dtype=torch.float64, device=device)
        capped = () if self.algorithm.importance_cap is None else ("capped_share",)
        sums = dict.fromkeys((*SUMS, *capped), zero)
        most = dict.fromkeys(("ratio_max", "logprob_diff_max"), zero)
        for micro in self.packed(tokens, teacher=False, logprobs=[sample.logprobs for sample in samples]):
            if micro.idle:
                self.take_part(micro)
                continue
            size = len(micro.tokens.targets)
            reference = None if ref_logprob is None else ref_logprob[done : done + size]
            done += size
            given = (micro, advantages[micro.index], micro.logprobs, reference, response_tokens)
            result = fsdp.inside(self.model, partial(self._policy_loss, *given))
            result.loss.backward()
            metrics = result.metrics
            signed = metrics.logprob - micro.logprobs
            difference = signed.abs()
            found = {
                "kl": metrics.kl_sum,
                "entropy": metrics.entropy_sum,
                "clip_fraction": metrics.clipped_sum,
                "logprob_diff_mean": difference.sum(),
                "logprob_far_share": (difference > FAR).sum(),
                # Not exp(d) - 1 - d: of small d that would be rounding alone.
                "sampler_kl": (signed.double().expm1() - signed).sum(),
            }
            if self.algorithm.importance_cap is not None:
                found["capped_share"] = (signed > math.log(self.algorithm.importance_cap)).sum()
            sums["loss"] = sums["loss"] + result.loss.detach()
            for name, value in found.items():
                sums[name] = sums[name] + value.double() / response_tokens
            for name, value in (("ratio_max", metrics.ratio_max), ("logprob_diff_max", difference.max())):
                most[name] = torch.maximum(most[name], value.double())
        if ref_logprob is not None and len(ref_logprob) != done:
            raise ValueError(f"this process has {done} sampled tokens of the batch, ref_logprob {len(ref_logprob)}")
        figures, _ = together(self.world, sums, most)
        return self.later(PolicyStats(figures, tokens=sum(group.tokens for group in tokens)))

    def _policy_loss(
        self, micro: MicroBatch, advantages: Tensor, sampled: Tensor, ref_logprob: Tensor | None, denominator: int
    ) -> GRPOLoss:
        """The loss of a micro-batch under algorithm.loss, default the clipped ratio with k3 KL in one fused op.

        Inside the model's forward.
        """
        algorithm, batch = self.algorithm, micro.tokens
        if self._loss is not None:
            logprob = self.logprobs(self.model, batch, self.temperature)
            inputs = LossInputs(logprob, advantages, ref_logprob, sampled, micro.sequences, denominator, algorithm)
            return by_function(self._loss, inputs)
        cap = algorithm.importance_cap
        return self._fused_loss(
            micro,
            advantages,
            denominator,
            ref_logprob=ref_logprob,
            temperature=self.temperature,
            kl_coef=algorithm.kl_coef,
            sampler_logprob=None if cap is None else sampled,
            importance_cap=cap,
            return_entropy=True,
        )

    def _fused_loss(self, micro: MicroBatch, advantages: Tensor, denominator: int, **others: Any) -> GRPOLoss:
        hidden, head = self.predicting_states(self.model, micro.tokens), self.model.get_output_embeddings()
        with autocast(self.settings.autocast, self.model.device):
            added = gradient_in_place(head.weight, self.settings.autocast)
            return fused(hidden, head, micro, advantages, denominator, self.algorithm, added, **others)

    def advantages(self, rewards: Rewards, sizes: Sequence[int]) -> Tensor:
        """A_i = (r_i - mean r) / (std r + floor) over each group, unbiased std; undivided where that is asked for.

        [S] float64, on the rewards' device. sizes: samples of every group. The floor is algorithm.advantage_std_floor:
        the paper's 1e-6 only avoids 0 / 0, one of the size of a usual std keeps groups whose rewards hardly differ from
        being blown up to full advantages.
        """
        if not isinstance(rewards, Tensor):
            rewards = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
        return group_advantages(
            rewards.double(),
            GroupLayout.of(sizes, teacher=False, device=rewards.device),
            normalise=self.algorithm.normalise_advantage,
            std_floor=self.algorithm.advantage_std_floor,
        )

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: StudentSettings | None = None,
        algorithm: AlgorithmSettings | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        temperature: float = 0.8,
        micro_batch_tokens: int = 16384,
        activation_checkpointing: Mode | Literal["auto"] = "auto",
    ) -> Student:
        """The student from a causal language model that is there, on whatever device it lies. It is changed in place:
        its layers compute by gadcore's functions from here on.

        Arguments and errors are those of Discriminator.wrap(), but that there is no head to miss.
        """
        name = model.config.name_or_path or type(model).__name__
        template = ready(model, tokenizer, name)
        check_head(model, name)
        return cls(
            model,
            settings or StudentSettings(),
            algorithm or AlgorithmSettings(),
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=activation_checkpointing,
            tokenizer=tokenizer,
            template=template,
            optimizer=optimizer,
        )

    def group(
        self,
        prompt: Messages,
        teacher: str,
        samples: Sequence[str],
        finished: Sequence[bool] | None = None,
        *,
        teacher_finished: bool = True,
        logprobs: Sequence[Sequence[float]] | None = None,
    ) -> Group:
        """A group from text, in the student's vocabulary; see gadcore.models.text_groups.text_group().

        ValueError for a student that was made without a template.
        """
        if self.template is None:
            raise ValueError("the student was made without a chat template: use Student.load or Student.wrap")
        return text_group(
            self.template, prompt, teacher, samples, finished, teacher_finished=teacher_finished, logprobs=logprobs
        )

    @torch.no_grad()
    def sample_logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Per group, per sample the log-probs [tokens] of its tokens under softmax(logits / temperature), in fp32 (fp64
        of an fp64 model) on the model's device."""
        found: dict[int, Tensor] = {}
        for micro in self.packed(_sampled(groups), teacher=False):
            logprob = self.logprobs(self.model, micro.tokens, self.temperature)
            if not micro.idle:
                found |= zip(micro.index.tolist(), logprob.split(micro.tokens.lengths), strict=True)
        if self.world.size > 1:
            # Each process has those of its own micro-batches: the greatest of every token is the one there is.
            lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
            dtype = torch.promote_types(self.model.dtype, torch.float32)
            everybody = torch.full((sum(lengths),), -torch.inf, dtype=dtype, device=self.model.device)
            places = everybody.split(lengths)
            for i, logprob in found.items():
                places[i].copy_(logprob)
            found = dict(enumerate(self.world.max_(everybody).split(lengths)))
        rows = iter(range(len(found)))
        return [[found[next(rows)] for _ in group.samples] for group in groups]


def _sampled(groups: Sequence[Group]) -> list[GroupTokens]:
    """[x | y_s^1 | ..] of every group."""
    return [GroupTokens(group.prompt.token_ids, tuple(s.token_ids for s in group.samples)) for group in groups]
