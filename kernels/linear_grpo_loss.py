"""The GRPO loss of a batch of responses, straight from hidden states: three matrix products in all.

    z_t       = W h_t + bias                                  logits, never held for all tokens
    logprob_t = log softmax(z_t / temperature)[y_t]
    loss      = sum_t [-w_t min(rho_t A, clip(rho_t) A) + kl_coef k3_t] / denominator      (grpo_ratio_loss.py)

Once advantages, old and reference log-probs are known, a token's loss depends on nothing but its own logits. So one
pass over chunks of tokens computes the logits of a chunk, its losses, d z, and at once what they add to d h and d W:

    d z_t[v] = slope_t (1[v = y_t] - p_t[v]) / (temperature denominator),     slope_t = d loss_t / d logprob_t

where autograd would keep the logits of all tokens or compute them again. The gradients are there when the loss is, and
the backward pass hands them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl, autocast, choose, implementation, without_autocast
from gadcore.kernels.grpo_ratio_loss import (
    GRPOLoss,
    GRPOMetrics,
    check_importance,
    check_tokens,
    group_advantages,
    importance_weights,
    ratio_terms,
)
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_logprob import IGNORED, check_head, head_gradients, linear_logprob_reference


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    groups: GroupLayout,
    *,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float,
    sampler_logprob: Tensor | None = None,
    importance_cap: float | None = None,
    return_entropy: bool = False,
    add_weight_gradient_to: Tensor | None = None,
    impl: Impl = "auto",
) -> GRPOLoss:
    """The clipped policy loss with k3 KL, its gradients, and metrics, in one pass over the tokens.

    hidden: [T, H]; weight: [V, H]; bias: [V] or None; targets: [T] int64, -100 where a token does not count: as in
    linear_logprob. groups: the layout of S sequences that own the T tokens (GroupLayout.of(.., lengths=..)).
    rewards: [S], from which group advantages are computed, or advantages: [S], ready; exactly one of them, float32 or
    float64. ref_logprob: [T] float32 or None where kl_coef is 0. old_logprob: [T] float32, or None when the batch gets
    one optimizer step (see grpo_ratio_loss). denominator: tokens of the whole batch, over micro-batches and ranks.
    sampler_logprob: [T] float32, and importance_cap, both or neither: importance weights w_t, else 1.
    return_entropy: sums the entropy into the metrics, which costs a little time. add_weight_gradient_to: what the
    gradient of weight is added to by this call, whatever backward() is called on later, instead of being handed to
    autograd; float32 as weight, for one that has a gradient already: two of [V, H] are then never held ("cpu" alone).
    Gradients go to hidden, weight and bias, and can be had once: a second backward pass raises RuntimeError. Raises
    ValueError for arguments that do not fit, RuntimeError for an `impl` that is not there.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature)
    tokens = len(hidden)
    if groups.tokens != tokens:
        raise ValueError(f"groups must own {tokens} tokens, own {groups.tokens}")
    if (rewards is None) == (advantages is None):
        raise ValueError("give either rewards or advantages")
    if rewards is not None:
        advantages = group_advantages(rewards, groups)
    assert advantages is not None
    if advantages.shape != (groups.sequences,):
        raise ValueError(
            f"advantages must be [{groups.sequences}], one for every sequence, are {list(advantages.shape)}"
        )
    added = add_weight_gradient_to
    if added is not None and (added.shape != weight.shape or not added.dtype == weight.dtype == torch.float32):
        raise ValueError(
            f"add_weight_gradient_to must be float32 {list(weight.shape)} as weight, is {list(added.shape)} "
            f"{added.dtype} for {weight.dtype}"
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    per_token = advantages.to(dtype)[groups.sequence_of]
    check_tokens(tokens, dtype, per_token, ref_logprob, old_logprob, kl_coef)
    check_importance(tokens, dtype, sampler_logprob, importance_cap)
    chosen = choose("linear_grpo_loss", impl, hidden)
    if chosen != "cpu" and added is not None:
        raise ValueError(f'add_weight_gradient_to needs impl="cpu", "{chosen}" would compute')
    if chosen == "reference":
        logprob, entropy = linear_logprob_reference(hidden, weight, targets, bias, temperature, return_entropy)
        counted = targets != IGNORED
        if sampler_logprob is not None and importance_cap is not None:
            before = logprob if old_logprob is None else old_logprob
            per_token = per_token * importance_weights(before, sampler_logprob, importance_cap)
        terms = ratio_terms(logprob, per_token, ref_logprob, old_logprob, clip_low, clip_high, kl_coef)
        per_token_loss, kl, ratio, clipped = (term.where(counted, 0.0) for term in terms)
        loss, logprob = per_token_loss.sum() / denominator, logprob.detach()
    else:
        grad = torch.is_grad_enabled()
        needs = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        constants = (float(temperature), float(clip_low), float(clip_high), float(kl_coef), float(denominator))
        tensors = (targets, per_token, ref_logprob, old_logprob)
        importance = (sampler_logprob, None if importance_cap is None else float(importance_cap))
        if added is None:
            loss, stats, *_ = _op(
                hidden, weight, bias, *tensors, *constants, return_entropy, *needs, *importance, chosen
            )
        else:
            others = (*tensors, *constants, return_entropy)
            loss, stats = _Adding.apply(hidden, bias, weight.detach(), added, others, _given(*importance))
        _, logprob, kl, ratio, clipped, entropy = stats
    metrics = GRPOMetrics(
        kl.sum(), clipped.sum(), ratio.max(), entropy.sum(), (targets != IGNORED).sum().to(dtype), logprob
    )
    return GRPOLoss(loss, metrics)


@torch.library.custom_op("gadcore::linear_grpo_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    temperature: float,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float,
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sampler_logprob: Tensor | None,
    importance_cap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [6, T], d hidden, d weight, d bias), gradients of the loss, empty where not needed.

    Rows of stats: loss per token, logprob, k3, ratio, clipped, entropy; 0 where the target is -100.
    """
    compute = implementation("linear_grpo_loss", impl)
    constants = (temperature, clip_low, clip_high, kl_coef, denominator)
    needs = (need_hidden, need_weight, need_bias)
    with without_autocast(hidden):
        stats, d_hidden, d_weight, d_bias = compute(
            hidden,
            weight,
            bias,
            targets,
            advantages,
            ref_logprob,
            old_logprob,
            *constants,
            entropy,
            *needs,
            **_given(sampler_logprob, importance_cap),
        )
    return stats[0].sum() / denominator, stats, d_hidden, d_weight, d_bias


def _given(sampler_logprob: Tensor | None, importance_cap: float | None) -> dict[str, Any]:
    """What an implementation is told of importance weights: nothing without them."""
    if sampler_logprob is None:
        return {}
    return {"sampler_logprob": sampler_logprob, "importance_cap": importance_cap}


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    temperature: float,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float,
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sampler_logprob: Tensor | None,
    importance_cap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stats = hidden.new_empty((6, len(hidden)), dtype=torch.float32)
    return stats.new_empty(()), stats, *head_gradients(hidden, weight, need_hidden, need_weight, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, *gradients = output
    ctx.mark_non_differentiable(stats, *gradients)
    # Else autograd makes zeros for what carries no gradient, [V, H] among them.
    ctx.set_materialize_grads(False)
    # Not save_for_backward: that keeps a reference, for which autograd would copy a gradient of [V, H] instead of
    # taking it.
    ctx.gradients = gradients


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = _handed_out(ctx)
    scaled = [
        _scaled(gradient, grad_loss) if needed else None
        for gradient, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)
    ]
    return *scaled, *[None] * 16


def _handed_out(ctx: Any) -> Any:
    if ctx.gradients is None:
        raise RuntimeError("linear_grpo_loss: the gradients were handed out already; compute the loss again")
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    # An upstream gradient of 1 is the rule. Only the CPU can look without waiting for anything, and only at a tensor
    # that is one: not at the stand-ins of torch.compile.
    if factor.device.type == "cpu" and type(factor) is Tensor and factor.item() == 1:
        return gradient
    return gradient * factor.to(gradient.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


class _Adding(torch.autograd.Function):
    """The op on the CPU, with the gradient of weight added to `add_to`, which a custom op with gradients cannot do."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        add_to: Tensor,
        others: tuple[Any, ...],
        importance: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        compute = implementation("linear_grpo_loss", "cpu")
        need_hidden, need_bias = ctx.needs_input_grad[:2]
        stats, *gradients = compute(hidden, weight, bias, *others, need_hidden, True, need_bias, add_to, **importance)
        ctx.gradients = gradients[0], gradients[2]
        ctx.mark_non_differentiable(stats)
        denominator = others[-2]
        return stats[0].sum() / denominator, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        needed = zip(_handed_out(ctx), ctx.needs_input_grad[:2], strict=True)
        hidden, bias = (_scaled(gradient, grad_loss) if need else None for gradient, need in needed)
        return hidden, bias, None, None, None, None
