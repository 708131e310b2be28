"""The door for a policy loss of one's own: algorithm.loss = "module:function".

The function gets LossInputs of a micro-batch and returns its part of the batch's loss, a scalar with a gradient to
inputs.logprob: a sum over the tokens divided by inputs.denominator, the tokens of the whole batch, so that the parts
add up whatever the cut. For example REINFORCE with group advantages:

    def reinforce(inputs):
        return -(inputs.token_advantages * inputs.logprob).sum() / inputs.denominator
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gadcore.config.settings import AlgorithmSettings
from gadcore.data.groups import MicroBatch
from gadcore.errors import UserError
from gadcore.kernels.grpo_ratio_loss import GRPOLoss, GRPOMetrics, importance_weights, ratio_terms
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss


@dataclass(frozen=True)
class LossInputs:
    """Of the R response tokens and S samples of a micro-batch.

    logprob: [R] float32 with a gradient, of the sampled tokens under softmax(logits / temperature).
    advantages: [S] float64, one a sample. ref_logprob: [R] of the reference policy, None where kl_coef is 0.
    sampled_logprob: [R] float32, what the sampler said when it drew them; importance_weights makes weights of it.
    layout: which token is of which sample and group.
    denominator: response tokens of the whole batch, over all micro-batches. algorithm: its settings.
    """

    logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor | None
    sampled_logprob: Tensor
    layout: GroupLayout
    denominator: int
    algorithm: AlgorithmSettings

    @property
    def token_advantages(self) -> Tensor:
        """[R], every token's sample's, in the dtype of logprob."""
        return self.advantages.to(self.logprob.dtype)[self.layout.sequence_of]

    @property
    def importance_weights(self) -> Tensor:
        """[R] in the dtype of logprob, without gradient: min(exp(logprob - sampled_logprob), algorithm.importance_cap),
        a factor of the policy's part of a token's loss; 1 where there is no cap."""
        if self.algorithm.importance_cap is None:
            return torch.ones_like(self.logprob.detach())
        sampled = self.sampled_logprob.to(self.logprob.dtype)
        return importance_weights(self.logprob, sampled, self.algorithm.importance_cap)


PolicyLoss = Callable[[LossInputs], Tensor]


def by_function(loss: PolicyLoss, inputs: LossInputs) -> GRPOLoss:
    """The loss that the function gives, with the metrics of the clipped ratio loss. UserError where it gives none."""
    found = loss(inputs)
    if not isinstance(found, Tensor) or found.dim() or not found.requires_grad:
        got = f"{list(found.shape)}, requires_grad={found.requires_grad}" if isinstance(found, Tensor) else repr(found)
        raise UserError(
            f"algorithm.loss = {inputs.algorithm.loss!r} must return a scalar tensor with a gradient to "
            f"inputs.logprob: got {got}"
        )
    algorithm, logprob = inputs.algorithm, inputs.logprob.detach()
    terms = ratio_terms(
        logprob,
        inputs.token_advantages,
        inputs.ref_logprob,
        None,
        algorithm.clip_low,
        algorithm.clip_high,
        algorithm.kl_coef,
    )
    _, kl, ratio, clipped = terms
    zero = torch.zeros_like(found.detach())
    tokens = torch.full_like(zero, len(logprob))
    return GRPOLoss(found, GRPOMetrics(kl.sum(), clipped.sum(), ratio.max(), zero, tokens, logprob))


def fused(
    hidden: Tensor,
    head: Any,
    micro: MicroBatch,
    advantages: Tensor,
    denominator: int,
    algorithm: AlgorithmSettings,
    add_weight_gradient_to: Tensor | None,
    *,
    ref_logprob: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    **others: Any,
) -> GRPOLoss:
    """The clipped ratio loss of a micro-batch, with its gradients in one pass over the tokens.

    hidden: [R, H], of the tokens that predict the R response tokens. head: the output embeddings. advantages: [S].
    Everything else is linear_grpo_loss()'s.
    """
    if sampler_logprob is not None:
        sampler_logprob = sampler_logprob.to(torch.promote_types(hidden.dtype, sampler_logprob.dtype))
    return linear_grpo_loss(
        hidden,
        head.weight,
        micro.tokens.targets,
        micro.sequences,
        bias=head.bias,
        advantages=advantages,
        ref_logprob=ref_logprob,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        denominator=denominator,
        sampler_logprob=sampler_logprob,
        add_weight_gradient_to=add_weight_gradient_to,
        **others,
    )
