"""Group advantages and the GRPO ratio loss.

    A_i    = (r_i - mean_i r) / (std_i r + 1e-6)                     unbiased std over the group's samples
    rho_t  = exp(logprob_t - old_logprob_t)
    k3_t   = exp(ref_t - logprob_t) - (ref_t - logprob_t) - 1
    loss   = sum_t [-min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t] / denominator

The denominator is the count of response tokens in the whole batch, over all micro-batches and ranks, so
that losses of micro-batches add up to the loss of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.layout import GroupLayout


def group_advantages(rewards: Tensor, groups: GroupLayout, *, normalise: bool = True) -> Tensor:
    """Advantages [S] of rewards [S]; `groups` has no teachers. A group of one gets an advantage of 0."""
    advantages = torch.empty_like(rewards)
    bounds = groups.offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        centred = rewards[start:end] - rewards[start:end].mean()
        if normalise and end - start > 1:
            centred = centred / (rewards[start:end].std(unbiased=True) + 1e-6)
        advantages[start:end] = centred
    return advantages


class GRPOLoss(NamedTuple):
    """loss: scalar with gradient. The rest are sums over tokens (ratio_max a maximum), without gradient."""

    loss: Tensor
    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_max: Tensor


def grpo_ratio_loss(
    logprob: Tensor,
    advantages: Tensor,
    *,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float,
) -> GRPOLoss:
    """The clipped policy loss with k3 KL over tokens.

    logprob, advantages: [T] fp32 or fp64; ref_logprob: [T], needed where kl_coef > 0.
    old_logprob: [T], or None when the batch gets one optimizer step: then the old policy *is* the policy,
    rho = exp(logprob - stopgrad(logprob)), which is 1 with the right gradient.
    """
    old = logprob.detach() if old_logprob is None else old_logprob
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    kl_sum = torch.zeros((), dtype=logprob.dtype, device=logprob.device)
    if ref_logprob is not None:
        log_ratio = ref_logprob - logprob
        k3 = log_ratio.exp() - log_ratio - 1
        kl_sum = k3.detach().sum()
        per_token = per_token + kl_coef * k3
    elif kl_coef > 0:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprob")
    with torch.no_grad():
        lost = (clipped * advantages) < (ratio * advantages)
    return GRPOLoss(per_token.sum() / denominator, kl_sum, lost.sum(), ratio.detach().max())
