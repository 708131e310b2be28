"""The GRPO loss over tokens of given log-probs, in Triton: the GPU side of grpo_ratio_loss.

rho    = exp(logprob - old)                   k3 = exp(ref - logprob) - (ref - logprob) - 1
loss   = -min(rho A, clamp(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef k3
slope  = d loss / d logprob = -(0 where clipped, else rho A) + kl_coef (1 - exp(ref - logprob))
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._shared import contiguous, on_its_device


@triton.jit
def loss_terms(logprob, advantage, ref, old, at, clip_min, clip_max, kl_coef):
    """(loss, k3, ratio, clipped, slope) of tokens `at`; ref and old are pointers or None."""
    # Without `old`, logprob - logprob and not 0: a log-prob that is NaN must show.
    before = logprob if old is None else tl.load(old + at)
    ratio = tl.exp(logprob - before)
    whole = ratio * advantage
    bounded = tl.minimum(tl.maximum(ratio, clip_min), clip_max) * advantage
    clipped = bounded < whole
    loss = -tl.where(clipped, bounded, whole)
    slope = -tl.where(clipped, 0.0, whole)
    k3 = tl.zeros_like(ratio)
    if ref is not None:
        log_ratio = tl.load(ref + at) - logprob
        ref_ratio = tl.exp(log_ratio)
        k3 = ref_ratio - log_ratio - 1.0
        loss += kl_coef * k3
        slope += kl_coef * (1.0 - ref_ratio)
    return loss, k3, ratio, clipped.to(tl.float32), slope


@triton.jit(do_not_specialize=["T"])
def _ratio_kernel(
    logprob,
    advantages,
    ref,
    old,
    stats,
    T,
    clip_min,
    clip_max,
    kl_coef,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < T
    # Tokens past the end compute the last one again: no mask on any load.
    read = tl.minimum(at, T - 1)
    advantage = tl.load(advantages + read)
    loss, k3, ratio, clipped, slope = loss_terms(
        tl.load(logprob + read), advantage, ref, old, read, clip_min, clip_max, kl_coef
    )
    out = stats + at
    tl.store(out, loss, mask=inside)
    tl.store(out + T, k3, mask=inside)
    tl.store(out + 2 * T, ratio, mask=inside)
    tl.store(out + 3 * T, clipped, mask=inside)
    tl.store(out + 4 * T, slope, mask=inside)


@on_its_device
def forward(
    logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> Tensor:
    """stats [5, T] fp32 of tokens: loss, k3 (0 without ref), ratio (1 without old), clipped (0 or 1), slope.

    logprob, advantages, ref_logprob, old_logprob: [T] fp32, T >= 1.
    """
    T = logprob.shape[0]
    stats = torch.empty(5, T, dtype=torch.float32, device=logprob.device)
    _ratio_kernel[(triton.cdiv(T, 128),)](
        logprob.contiguous(),
        advantages.contiguous(),
        contiguous(ref_logprob),
        contiguous(old_logprob),
        stats,
        T,
        1.0 - clip_low,
        1.0 + clip_high,
        kl_coef,
        BLOCK=128,
    )
    return stats
