"""Group advantages and the GRPO ratio loss.

    A_i    = (r_i - mean_i r) / (std_i r + 1e-6)                     unbiased std over the group's samples
    rho_t  = exp(logprob_t - old_logprob_t)
    k3_t   = exp(ref_t - logprob_t) - (ref_t - logprob_t) - 1
    loss   = sum_t [-min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t] / denominator

The denominator is the count of response tokens in the whole batch, over all micro-batches and ranks, so
that losses of micro-batches add up to the loss of the batch.

Against a sampler that computes other log-probs than the trainer, for the same weights: truncated importance sampling
(Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"), by token,

    w_t    = min(exp(old_logprob_t - sampler_logprob_t), importance_cap)       without gradient
    loss   = sum_t [-w_t min(rho_t A, clip(rho_t) A) + kl_coef k3_t] / denominator

as TRL's "token_truncate" and verl's token-level rollout weights have it. The sample is the sampler's and the clip asks
how far the policy has gone from its own old self, so the weight stands between sampler and old policy, outside of the
clip. Truncated from above alone: there the variance is. The KL term stays as it is: it is a penalty on the policy, with
a gradient that pulls towards the reference whoever drew the token. Since w_t >= 0, it is a factor of the advantage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose, implementation
from gadcore.kernels.layout import GroupLayout


def group_advantages(
    rewards: Tensor, groups: GroupLayout, *, normalise: bool = True, std_floor: float = 1e-6
) -> Tensor:
    """Advantages [S] of rewards [S], (r - mean r) / (std r + std_floor), in float64, in the dtype of `rewards`.

    A teacher's reward is left out and its advantage is 0; a sample alone in its group gets 0 too.
    """
    if rewards.shape != (groups.sequences,):
        raise ValueError(f"rewards must be [{groups.sequences}], one for every sequence, are {list(rewards.shape)}")
    group, teacher = groups.group_of, groups.is_teacher
    offsets = groups.group_offsets
    count = (offsets.diff() - groups.has_teacher.long()).double()

    def group_sum(values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)

    samples = rewards.double().masked_fill(teacher, 0.0)
    mean = group_sum(samples) / count.clamp(min=1)
    centred = (samples - mean[group]).masked_fill(teacher, 0.0)
    if normalise:
        std = (group_sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std[group] + std_floor)
    return centred.to(rewards.dtype)


class GRPOMetrics(NamedTuple):
    """What a loss found, without gradient and without waiting for a GPU: sums over the counted tokens, to be divided
    at the end.

    kl_sum: of k3, 0 without ref_logprob. clipped_sum: tokens whose gradient the clip took away. ratio_max: the largest
    rho. entropy_sum: 0 where it was not asked for. tokens: those that count. All scalars. logprob: [T].
    """

    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_max: Tensor
    entropy_sum: Tensor
    tokens: Tensor
    logprob: Tensor


class GRPOLoss(NamedTuple):
    """loss: scalar with gradient."""

    loss: Tensor
    metrics: GRPOMetrics


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
    sampler_logprob: Tensor | None = None,
    importance_cap: float | None = None,
    impl: Impl = "auto",
) -> GRPOLoss:
    """The clipped policy loss with k3 KL over T tokens, loss and gradient in one pass.

    logprob, advantages: [T] float32 (float64 by the reference alone); the gradient goes to logprob.
    ref_logprob: [T], needed where kl_coef > 0.
    old_logprob: [T], or None when the batch gets one optimizer step: then the old policy *is* the policy,
    rho = exp(logprob - stopgrad(logprob)), which is 1 with the right gradient.
    sampler_logprob: [T], what the sampler said, and importance_cap, both or neither: importance weights.
    Raises ValueError for arguments that do not fit, RuntimeError for an `impl` that is not there.
    """
    if logprob.dim() != 1 or len(logprob) == 0 or not logprob.is_floating_point():
        raise ValueError(f"logprob must be floating point [T] with T >= 1, got {logprob.dtype} {list(logprob.shape)}")
    check_tokens(len(logprob), logprob.dtype, advantages, ref_logprob, old_logprob, kl_coef)
    check_importance(len(logprob), logprob.dtype, sampler_logprob, importance_cap)
    if sampler_logprob is not None and importance_cap is not None:
        before = logprob if old_logprob is None else old_logprob
        advantages = advantages * importance_weights(before, sampler_logprob, importance_cap)
    chosen = choose("grpo_ratio_loss", impl, logprob)
    if chosen == "reference":
        terms = ratio_terms(logprob, advantages, ref_logprob, old_logprob, clip_low, clip_high, kl_coef)
        loss, kl, ratio, clipped = terms[0].sum() / denominator, *terms[1:]
    else:
        constants = (float(clip_low), float(clip_high), float(kl_coef), float(denominator))
        loss, stats = _op(logprob, advantages, ref_logprob, old_logprob, *constants, chosen)
        kl, ratio, clipped = stats[1], stats[2], stats[3]
    zero = torch.zeros((), dtype=logprob.dtype, device=logprob.device)
    tokens = torch.full_like(zero, len(logprob))
    return GRPOLoss(loss, GRPOMetrics(kl.sum(), clipped.sum(), ratio.max(), zero, tokens, logprob.detach()))


def ratio_terms(
    logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mathematics in PyTorch: loss with gradient, k3, ratio, and whether the clip took the gradient away; each
    [T]."""
    old = logprob.detach() if old_logprob is None else old_logprob
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(logprob)
    if ref_logprob is not None:
        log_ratio = ref_logprob - logprob
        k3 = log_ratio.exp() - log_ratio - 1
        loss = loss + kl_coef * k3
    with torch.no_grad():
        lost = (clipped * advantages) < (ratio * advantages)
    return loss, k3.detach(), ratio.detach(), lost.to(logprob.dtype)


def importance_weights(old_logprob: Tensor, sampler_logprob: Tensor, cap: float) -> Tensor:
    """min(exp(old_logprob - sampler_logprob), cap) [T], without gradient; NaN stays NaN."""
    return (old_logprob.detach() - sampler_logprob).exp().clamp(max=cap)


def check_importance(tokens: int, dtype: torch.dtype, sampler_logprob: Tensor | None, cap: float | None) -> None:
    """Raises ValueError where importance weights cannot be made of what was given for them."""
    if (sampler_logprob is None) != (cap is None):
        raise ValueError("give both sampler_logprob and importance_cap, or neither")
    if sampler_logprob is not None and (sampler_logprob.shape != (tokens,) or sampler_logprob.dtype != dtype):
        raise ValueError(
            f"sampler_logprob must be {dtype} [{tokens}], got {sampler_logprob.dtype} {list(sampler_logprob.shape)}"
        )
    if cap is not None and not cap > 0:
        raise ValueError(f"importance_cap must be above 0, is {cap}")


def check_tokens(
    tokens: int,
    dtype: torch.dtype,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    kl_coef: float,
) -> None:
    """Raises ValueError where what a GRPO loss needs for every token does not fit."""
    named = {"advantages": advantages, "ref_logprob": ref_logprob, "old_logprob": old_logprob}
    for name, tensor in named.items():
        if tensor is not None and (tensor.shape != (tokens,) or tensor.dtype != dtype):
            raise ValueError(f"{name} must be {dtype} [{tokens}], got {tensor.dtype} {list(tensor.shape)}")
    if ref_logprob is None and kl_coef > 0:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprob")


@torch.library.custom_op("gadcore::grpo_ratio_loss", mutates_args=())
def _op(
    logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(loss, stats [5, T]: loss per token, k3, ratio, clipped, d loss / d logprob, none of them divided)."""
    compute = implementation("grpo_ratio_loss", impl)
    stats = compute(logprob, advantages, ref_logprob, old_logprob, clip_low, clip_high, kl_coef)
    return stats[0].sum() / denominator, stats


@_op.register_fake
def _(
    logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return logprob.new_empty(()), logprob.new_empty((5, len(logprob)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.denominator = inputs[7]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
    (stats,) = ctx.saved_tensors
    return stats[4] * (grad_loss / ctx.denominator), *[None] * 8


_op.register_autograd(_backward, setup_context=_setup_context)
