"""GADGRPOTrainer: TRL's GRPOTrainer with gadcore's packed groups and fused heads, to the same loss and gradients.

Two things are computed otherwise. Log-probabilities, of policy, old policy and reference alike, come from packed groups
(a prompt passes through the model once, not once a sample) and linear_logprob; every loss of TRL is then TRL's own
code. Where the loss of a token depends on that token's log-probability alone, and with one weight for all of its terms,
linear_grpo_loss makes loss and gradients in one pass over the tokens instead, three matrix products of the head in
place of four; TRL's code then computes its metrics alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer

from gadcore.errors import UserError
from gadcore.integrations.trl.packed import Rows, packed_rows, use_packed_rows
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.kernels.linear_logprob import IGNORED, linear_logprob
from gadcore.models.backbone import ATTENTION
from gadcore.models.checks import check_head, check_packing

# Losses whose tokens all have one denominator.
_ONE_DENOMINATOR = ("dapo", "bnpo", "dr_grpo")
# Losses whose gradient does not depend on which rows of an optimizer step pass through the model together.
_ANY_CUT = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


class GADGRPOTrainer(GRPOTrainer):
    """Takes what GRPOTrainer takes, and

    fuse: norms, MLPs, linear layers and the rotation of the model by gadcore's functions, which compute them faster.
    whole_groups: rows of one prompt pass through the model together where the gradient does not depend on it; TRL
    shuffles them over the micro-batches of a generation, which leaves little of a prompt to be shared.

    UserError for what it cannot compute: adapters (PEFT), images, mixtures of experts with an auxiliary loss, the
    entropy bonus, sharded models (FSDP, DeepSpeed), and what TRL does to a head or a layer that gadcore replaces.
    """

    # GRPOConfig and PreTrainedModel, which TRL's base class knows as less.
    args: Any
    model: Any
    ref_model: Any
    max_completion_length: Any

    def __init__(self, *args: Any, fuse: bool = True, whole_groups: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse()
        for model in (self.model, self.ref_model):
            if model is not None:
                name = str(model.config._name_or_path)
                check_packing_of(model, name)
                use_packed_rows(model, fuse=fuse)
        self._whole_groups = whole_groups and self._any_cut()
        # What _get_per_token_logps_and_entropies() gives where a loss has been computed already.
        self._known: tuple[Tensor, Tensor] | None = None

    def _refuse(self) -> None:
        args = self.args
        reasons = {
            "adapters (PEFT)": is_peft_model(self.model),
            "images": self._is_vlm,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "entropy_coef or use_adaptive_entropy (its entropy has no gradient)": self._entropy_bonus_enabled,
            "cast_lm_head_to_fp32 (gadcore accumulates in float32 as it is)": args.cast_lm_head_to_fp32,
            "use_liger_kernel": args.use_liger_kernel,
            "torch_compile": args.torch_compile,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
        }
        for what, there in reasons.items():
            if there:
                raise UserError(f"GADGRPOTrainer cannot compute with {what}: leave it out, or use TRL's GRPOTrainer")
        attention = self.model.config._attn_implementation
        if attention not in ("sdpa", ATTENTION):
            raise UserError(
                f"GADGRPOTrainer attends by sdpa where it does not pack, the model by {attention!r}: load it with "
                'model_init_kwargs={"attn_implementation": "sdpa"}'
            )

    def _any_cut(self) -> bool:
        """Whether all rows of a generation meet in one optimizer step, under a loss that does not see their cut."""
        one_step = self.args.gradient_accumulation_steps % self.args.steps_per_generation == 0
        return one_step and self.loss_type in _ANY_CUT and self.top_entropy_quantile == 1.0

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or not self._whole_groups:
            return inputs
        self._buffered_inputs = _by_prompt(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """([B, C] log-probabilities of the completion tokens, their entropies, None); 0 where the mask is."""
        if self._known is not None:
            return *self._known, None
        shape = len(input_ids), logits_to_keep
        # No pass has more tokens than one of TRL's.
        budget = (batch_size or len(input_ids)) * input_ids.shape[1]
        found, entropies = [], []
        for rows in packed_rows(input_ids, attention_mask, logits_to_keep, budget, self.model):

            def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows = rows) -> Any:
                return linear_logprob(
                    hidden,
                    weight,
                    rows.batch.targets,
                    bias=bias,
                    temperature=self.temperature,
                    return_entropy=True,
                )

            with self.accelerator.autocast():
                logprob, entropy = model(packed=rows.batch, head=head)
            found.append(rows.put(logprob, shape))
            entropies.append(rows.put(entropy, shape))
        if not found:
            # Every row is masked. TRL's pass gives a gradient of 0 to all parameters, for which wrappers wait.
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy
            )
        return sum(found[1:], found[0]), sum(entropies[1:], entropies[0]).detach() if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        one_pass = self.model.training and self._token_by_token() and inputs["advantages"].dim() == 1 and mask.any()
        if not one_pass:
            return super()._compute_loss(model, inputs)
        loss, logprob, entropy = self._one_pass(model, inputs, mask)
        with self._knowing(logprob, entropy), torch.no_grad():
            # TRL's metrics, by TRL's code.
            super()._compute_loss(model, inputs)
        return loss

    def _token_by_token(self) -> bool:
        """Whether linear_grpo_loss has the loss: sum_t c_t [-min(rho A, clip(rho) A) + beta k3], c_t all equal, or
        without the KL term, where c_t > 0 is a factor of the advantage."""
        weights = self.loss_type in _ONE_DENOMINATOR or (self.loss_type == "grpo" and self.beta == 0)
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return (
            weights
            and self.importance_sampling_level == "token"
            and self.args.delta is None
            and self.top_entropy_quantile == 1.0
            and self.off_policy_mask_threshold is None
            and not (self.beta != 0 and self.args.use_bias_correction_kl)
            and not corrected
        )

    def _one_pass(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss with gradients, log-probabilities [B, C], entropies [B, C] that have the mean of all)."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        (rows,) = packed_rows(input_ids, seen, mask.shape[1], input_ids.numel(), self.model)
        counted = rows.taken(mask).bool()
        targets = rows.batch.targets.masked_fill(~counted, IGNORED)
        advantages, denominator = self._weights(inputs, mask)
        layout = GroupLayout.of([len(rows.lengths)], teacher=False, lengths=rows.lengths, device=targets.device)
        old, reference = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            found = linear_grpo_loss(
                hidden,
                weight,
                targets,
                layout,
                bias=bias,
                advantages=advantages[rows.row_of],
                ref_logprob=None if reference is None else rows.taken(reference),
                old_logprob=None if old is None else rows.taken(old),
                temperature=self.temperature,
                clip_low=self.epsilon_low,
                clip_high=self.epsilon_high,
                kl_coef=self.beta,
                denominator=denominator,
                return_entropy=True,
            )
            return found.loss, found.metrics.logprob, found.metrics.entropy_sum

        with self.accelerator.autocast():
            loss, logprob, entropy = model(packed=rows.batch, head=head)
        mean = (entropy.detach() / mask.sum()).expand(mask.shape)
        return loss, rows.put(logprob.detach(), mask.shape), mean

    def _weights(self, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, float]:
        """(advantages [B], denominator) by which linear_grpo_loss gives TRL's loss."""
        advantages, count = inputs["advantages"].float(), len(mask)
        steps = self.current_gradient_accumulation_steps
        if self.loss_type == "dapo":
            # Tokens of the whole generation, of which an optimizer step takes a part.
            tokens = inputs["num_items_in_batch"].clamp(min=1).item() / self.accelerator.num_processes
            return advantages, tokens * steps / self.args.steps_per_generation
        if self.loss_type == "bnpo":
            return advantages, mask.sum().item() * steps
        if self.loss_type == "dr_grpo":
            return advantages, float(count * self.max_completion_length * steps)
        return advantages / mask.sum(1).clamp(min=1), float(count * steps)

    @contextmanager
    def _knowing(self, logprob: Tensor, entropy: Tensor) -> Any:
        self._known = logprob, entropy
        try:
            yield
        finally:
            self._known = None


def check_packing_of(model: Any, name: str) -> None:
    """Raises UserError unless a model computes for packed groups what it computes for rows, by probes of two layers."""
    attention = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        check_packing(model, name)
        check_head(model, name)
    finally:
        model.set_attn_implementation(attention)


def _by_prompt(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all micro-batches, those of one prompt beside each other, cut as before."""
    cut = len(batches[0]["prompt_ids"])
    places: dict[tuple[int, ...], list[int]] = {}
    prompts = (ids for batch in batches for ids in batch["prompt_ids"].tolist())
    for row, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(row)
    order = [row for rows in places.values() for row in rows]
    index = torch.tensor(order, device=batches[0]["prompt_ids"].device)
    sorted_by: dict[str, Any] = {}
    for key, first in batches[0].items():
        if isinstance(first, Tensor) and first.dim():
            sorted_by[key] = torch.cat([batch[key] for batch in batches])[index]
        elif isinstance(first, list):
            everything = [value for batch in batches for value in batch[key]]
            sorted_by[key] = [everything[row] for row in order]
        else:
            sorted_by[key] = first
    return [
        {
            key: value[i * cut : (i + 1) * cut]
            if isinstance(value, list) or (isinstance(value, Tensor) and value.dim())
            else value
            for key, value in sorted_by.items()
        }
        for i in range(len(batches))
    ]
