"""The GRPO loss over tokens with its log-probs and gradients in one pass, in Triton: the GPU side of linear_grpo_loss.

    z      = hidden @ weight.T + bias             logprob_t = log softmax(z_t / temperature)[y_t]
    d z_tv = slope_t / denominator (1[v = y_t] - p_tv) / temperature

with the loss and the slope of grpo_ratio_loss.py. It goes through the tokens in chunks: cuBLAS writes the fp32 logits
of a chunk, one kernel turns them into the loss and, in place, into d logits, and cuBLAS makes both gradients of those:
three products in all, and no [T, V].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._shared import IGNORED, LN2, LOG2E, contiguous, mm_into, on_its_device
from gadcore.kernels.triton.grpo_ratio_loss import loss_terms

# Scratch for the logits of a chunk. Each chunk after the first reads and writes the fp32 d_weight once more, which at
# 4096 tokens a chunk takes about a fifteenth of the time of its products.
LOGITS_BYTES = 2 << 30
BLOCK = 4096


@triton.jit
def _block(logits, bias, first, V, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    z = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
    return columns, z


@triton.jit(do_not_specialize=["T"])
def _rows_kernel(
    logits,
    dlogits,
    bias,
    targets,
    advantages,
    ref,
    old,
    sampler,
    stats,
    T,
    V,
    stride_logits,
    stride_dlogits,
    scale,
    inverse_temperature,
    clip_min,
    clip_max,
    kl_coef,
    importance_cap,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a chunk: its six statistics, and slope (1[v = y] - p) over its logits (see `forward`)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride_logits
    y = tl.load(targets + row)
    kept = y != IGNORED
    known = (y >= 0) & (y < V)
    column = tl.where(known, y, -1).to(tl.int32)
    blocks = tl.cdiv(V, BLOCK)
    # A maximum and a sum for every lane, joined once at the end: no barrier in the loop.
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for i in range(blocks):
        _, z = _block(logits, bias, i * BLOCK, V, BLOCK)
        new = tl.maximum(m, z)
        reference = tl.where(new == float("-inf"), 0.0, new)
        shift = (m - reference) * scale
        exponent = (z - reference) * scale
        decay = tl.exp2(shift)
        if ENTROPY:
            exponent = tl.maximum(exponent, -200.0)
            moved = weighted + total * tl.where(m == float("-inf"), 0.0, shift)
            e = tl.exp2(exponent)
            weighted = moved * decay + e * exponent
        else:
            e = tl.exp2(exponent)
        total = total * decay + e
        m = new
    row_max = tl.max(m, 0)
    shift = tl.where(m == float("-inf"), -200.0, (m - row_max) * scale)
    decay = tl.exp2(shift)
    row_total = tl.sum(total * decay, 0)
    log_sum = tl.log(row_total)
    picked = tl.load(logits + y, mask=known, other=float("nan"))
    if bias is not None:
        picked += tl.load(bias + y, mask=known, other=0.0).to(tl.float32)
    logprob = (picked - row_max) * inverse_temperature - log_sum
    advantage = tl.load(advantages + row)
    if sampler is not None:
        before = logprob if old is None else tl.load(old + row)
        importance = tl.exp(before - tl.load(sampler + row))
        # Not tl.minimum, which makes a number of NaN.
        advantage *= tl.where(importance > importance_cap, importance_cap, importance)
    loss, k3, ratio, clipped, slope = loss_terms(logprob, advantage, ref, old, row, clip_min, clip_max, kl_coef)
    # Rows of `stats` lie T apart: T is the number of all tokens, not of this chunk's.
    out = stats + row
    tl.store(out, tl.where(kept, loss, 0.0))
    tl.store(out + T, tl.where(kept, logprob, 0.0))
    tl.store(out + 2 * T, tl.where(kept, k3, 0.0))
    tl.store(out + 3 * T, tl.where(kept, ratio, 0.0))
    tl.store(out + 4 * T, tl.where(kept, clipped, 0.0))
    spread = 0.0
    if ENTROPY:
        spread = log_sum - tl.sum((weighted + total * shift) * decay, 0) / row_total * LN2
    tl.store(out + 5 * T, tl.where(kept, spread, 0.0))
    if GRADIENT:
        dlogits += row.to(tl.int64) * stride_dlogits
        slope = tl.where(kept, slope, 0.0)
        log2_sum = log_sum * LOG2E
        # Backwards: what was read last is still in cache, and d logits may overwrite what is done with.
        for i in range(blocks):
            columns, z = _block(logits, bias, (blocks - 1 - i) * BLOCK, V, BLOCK)
            p = tl.exp2((z - row_max) * scale - log2_sum)
            dz = slope * (tl.where(columns == column, 1.0, 0.0) - p)
            # d logits of this block lie where other warps' logits of this block are: wait until all have read.
            tl.debug_barrier()
            tl.store(dlogits + columns, dz.to(dlogits.dtype.element_ty), mask=columns < V)


def chunk_tokens(T: int, row_bytes: int) -> int:
    """Tokens of a chunk of `forward`: as many rows of logits as LOGITS_BYTES hold, all chunks about alike."""
    chunks = triton.cdiv(T, max(LOGITS_BYTES // row_bytes, 1))
    return triton.cdiv(T, chunks)


@on_its_device
def forward(
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
    sampler_logprob: Tensor | None = None,
    importance_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stats [6, T] fp32, d hidden [T, H], d weight [V, H], d bias [V]); gradients in the dtypes of what they belong
    to, of sum(loss) / denominator, and [0] where not needed.

    Rows of stats: loss (not divided), log-prob, k3 (0 without ref), ratio (1 without old), clipped (0 or 1), entropy (0
    when not asked); all 0 where the target is -100, all NaN but `clipped` where it is another one outside [0, V).
    hidden: [T, H]; weight: [V, H]; bias: [V] or None; all fp32, bf16 or fp16, any strides; targets: [T] int64;
    advantages, ref_logprob, old_logprob, sampler_logprob: [T] fp32. The last and importance_cap come together.
    Logits may be -inf, as long as each row has a finite one. d logits is rounded to the dtype of `hidden`, before the
    division by the denominator, so that fp16 does not lose it; everything is added up in fp32.
    """
    bias, targets, advantages = contiguous(bias), targets.contiguous(), advantages.contiguous()
    ref_logprob, old_logprob = contiguous(ref_logprob), contiguous(old_logprob)
    sampler_logprob = contiguous(sampler_logprob)
    (T, H), V, device, dtype = hidden.shape, weight.shape[0], hidden.device, hidden.dtype
    gradient = need_hidden or need_weight or need_bias
    stats = torch.empty(6, T, dtype=torch.float32, device=device)
    d_hidden = torch.empty((T, H) if need_hidden else (0,), dtype=dtype, device=device)
    d_bias = torch.zeros(V if need_bias else 0, dtype=torch.float32, device=device)
    padded = triton.cdiv(V, 64) * 64  # aligned rows, whatever V is
    chunk = chunk_tokens(T, padded * 4)
    d_weight = torch.empty(
        (V, H) if need_weight else (0,), dtype=weight.dtype if chunk >= T else torch.float32, device=device
    )
    scratch = torch.empty(chunk, padded, dtype=torch.float32, device=device)
    # In place: fp32 over fp32, and 16 bits in the second half of a row, which the kernel has read by then.
    dlogits = scratch if dtype == torch.float32 else scratch.view(dtype)[:, padded:]
    part = torch.empty((chunk, H) if need_hidden else (0,), dtype=torch.float32, device=device)
    alpha = 1.0 / (denominator * temperature)
    for first in range(0, T, chunk):
        tokens = slice(first, min(first + chunk, T))
        rows = hidden[tokens]
        count = rows.shape[0]
        mm_into(scratch[:count, :V], rows, weight.t())
        _rows_kernel[(count,)](
            scratch,
            dlogits,
            bias,
            targets[tokens],
            advantages[tokens],
            None if ref_logprob is None else ref_logprob[tokens],
            None if old_logprob is None else old_logprob[tokens],
            None if sampler_logprob is None else sampler_logprob[tokens],
            stats[:, tokens],
            T,
            V,
            scratch.stride(0),
            dlogits.stride(0),
            LOG2E.value / temperature,
            1.0 / temperature,
            1.0 - clip_low,
            1.0 + clip_high,
            kl_coef,
            0.0 if importance_cap is None else importance_cap,
            ENTROPY=entropy,
            GRADIENT=gradient,
            BLOCK=min(BLOCK, triton.next_power_of_2(V)),
            num_warps=8,
        )
        dz = dlogits[:count, :V]
        if need_hidden:
            mm_into(part[:count], dz, weight, alpha=alpha)
            d_hidden[tokens] = part[:count]
        if need_weight:
            mm_into(d_weight, dz.t(), rows, alpha=alpha, add=first > 0)
        if need_bias:
            d_bias += dz.sum(0, dtype=torch.float32)
    d_bias = (d_bias * alpha).to(weight.dtype if bias is None else bias.dtype)
    return stats, d_hidden, d_weight.to(weight.dtype), d_bias
