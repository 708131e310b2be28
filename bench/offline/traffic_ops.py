"""The ops that the suite traffic meters, ours and Liger-Kernel's, each with its minimum and its check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# Before the kernels below are imported.
import bench.offline.interpreter as interpreter  # isort: skip

import torch
from torch import Tensor

from bench import record
from bench.offline.as_cuda import as_cuda
from bench.offline.meter import Cache, Traffic, metered
from bench.offline.traffic_sizes import CLIP, KL, RESIDENT, SCALE, TEMPERATURE, Measured, Sizes

BF16, F32 = torch.bfloat16, torch.float32
GRADIENTS = (True, True, False)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm. NaN counts as infinite: it must fail every limit."""
    error = ((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
    return math.inf if math.isnan(error) else error


class _Bench:
    def __init__(self, l2_bytes: int) -> None:
        self.cache = Cache(bytes=l2_bytes, resident=RESIDENT)
        self.results: list[Measured] = []

    def meter(
        self,
        op: str,
        impl: str,
        shape: str,
        call: Callable[[], tuple[Tensor, ...]],
        expected: tuple[Tensor, ...] | None,
        minimum: int,
        limited: bool = False,
    ) -> tuple[Tensor, ...]:
        """Runs a side as if on CUDA, counts, and compares its outputs with what is expected of them, if anything is."""
        with as_cuda("cpu", l2_bytes=self.cache.bytes), metered(self.cache) as meter:
            outputs = call()
        rows: list[Traffic] = meter.rows
        error = None
        if expected is not None:
            error = max(_error(got, wanted) for got, wanted in zip(outputs, expected, strict=True))
        self.results.append(Measured(op, impl, shape, minimum, rows, error, limited))
        unique, modelled = (sum(getattr(row, name) for row in rows) / minimum for name in ("unique", "modelled"))
        record.say(f"{op}, {impl}: {unique:.3f} x the minimum, modelled {modelled:.3f} x, error {error}")
        return outputs


def production_grid(sizes: Sizes) -> list[Measured]:
    """linear_logprob forward with the programs and waves of a real model's: its addresses, without its numbers."""
    from gadcore.kernels.triton import linear_logprob

    T, H, V, l2_bytes = sizes.grid
    bench = _Bench(l2_bytes)
    hidden, weight, targets = torch.zeros(T, H, dtype=BF16), torch.zeros(V, H, dtype=BF16), torch.randint(V, (T,))
    with interpreter.addresses_only():
        bench.meter(
            "linear_logprob forward on production's grid",
            "triton",
            f"T={T} H={H} V={V}",
            lambda: linear_logprob.forward(hidden, weight, None, targets, TEMPERATURE, False),
            None,
            _bytes(hidden, weight, targets) + 3 * 4 * T,
            limited=True,
        )
    return bench.results


def head_ops(sizes: Sizes) -> list[Measured]:
    """linear_logprob and linear_grpo, beside Liger's cross-entropy, log-softmax and GRPO loss."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
    from liger_kernel.ops.grpo_loss import GrpoLossFunction, fused_selective_log_softmax

    from gadcore.kernels.triton import linear_grpo_loss, linear_logprob

    bench = _Bench(sizes.cache_bytes)
    T, H, V, B = sizes.T, sizes.H, sizes.V, sizes.rows
    linear_logprob.DLOGITS_BYTES = int(linear_logprob.DLOGITS_BYTES / SCALE**2)
    linear_grpo_loss.LOGITS_BYTES = int(linear_grpo_loss.LOGITS_BYTES / SCALE**2)
    L, shape = T // B, f"T={T} H={H} V={V}"
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, H).to(BF16), (torch.randn(V, H) / math.sqrt(H)).to(BF16)
    targets = torch.randint(V, (T,))
    advantages = torch.randn(B).repeat_interleave(L)
    logits = hidden.float() @ weight.float().T
    log_p = torch.log_softmax(logits / TEMPERATURE, -1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    ref = logprob + 0.1 * torch.randn(T)

    def gradients(slope: Tensor) -> tuple[Tensor, Tensor]:
        """d hidden and d weight of sum(slope * logprob), with d logits rounded as both sides do."""
        dz = -slope[:, None] * log_p.exp()
        dz[torch.arange(T), targets] += slope
        dz = (dz / TEMPERATURE).to(BF16).float()
        return dz @ weight.float(), dz.T @ hidden.float()

    # --- log-probabilities: forward ------------------------------------------------------------------------------
    forward = _bytes(hidden, weight, targets) + 3 * 4 * T
    bench.meter(
        "linear_logprob forward",
        "triton",
        shape,
        lambda: linear_logprob.forward(hidden, weight, None, targets, TEMPERATURE, False),
        (logprob, logits.max(1).values, torch.logsumexp(logits - logits.max(1).values[:, None], 1), torch.empty(0)),
        forward,
        limited=True,
    )
    bench.meter(
        "linear_logprob forward",
        "Liger-Kernel, fused linear cross-entropy",
        shape,
        lambda: (-fused_linear_cross_entropy_forward(hidden, weight, targets, reduction="none")[0],),
        (logprob,),
        forward,
    )

    def padded() -> Tensor:
        # Liger's GRPO functions want one position more than there are tokens, and drop its logits.
        return torch.cat([hidden.view(B, L, H), hidden.new_zeros(B, 1, H)], 1)

    with_one_more = padded()

    def log_softmax() -> tuple[Tensor]:
        z = (with_one_more.view(-1, H) @ weight.T).view(B, L + 1, V)
        return (fused_selective_log_softmax(z, targets.view(B, L), TEMPERATURE).view(-1),)

    bench.meter(
        "linear_logprob forward",
        "product, then Liger-Kernel's selective log-softmax",
        shape,
        log_softmax,
        (logprob,),
        forward,
    )

    # --- log-probabilities: forward and backward -----------------------------------------------------------------
    slope = torch.full((T,), -1 / T)
    d_hidden, d_weight = gradients(slope)
    both = _bytes(hidden, weight, targets) + _bytes(hidden, weight) + 4 * T + 4 * T

    def ours() -> tuple[Tensor, ...]:
        logprob, row_max, log_sum, _ = linear_logprob.forward(hidden, weight, None, targets, TEMPERATURE, False)
        d_hidden, d_weight, _ = linear_logprob.backward(
            slope, hidden, weight, None, targets, row_max, log_sum, TEMPERATURE, *GRADIENTS
        )
        return logprob, d_hidden, d_weight

    def ligers() -> tuple[Tensor, ...]:
        loss, _, _, _, d_hidden, d_weight, _ = fused_linear_cross_entropy_forward(
            hidden, weight, targets, compute_gradients=True, weight_requires_grad=True
        )
        return loss, d_hidden, d_weight

    op = "linear_logprob forward and backward"
    bench.meter(op, "triton", shape, ours, (logprob, d_hidden, d_weight), both)
    liger = "Liger-Kernel, fused linear cross-entropy"
    bench.meter(op, liger, shape, ligers, (-logprob.mean(), d_hidden, d_weight), both)
    # --- GRPO ----------------------------------------------------------------------------------------------------
    # Without an old policy the ratio is 1, and nothing is clipped.
    k3 = (ref - logprob).exp() - (ref - logprob) - 1
    loss = -advantages + KL * k3
    d_hidden, d_weight = gradients((-advantages + KL * (1 - (ref - logprob).exp())) / T)
    least = 2 * _bytes(hidden, weight) + _bytes(targets, advantages, ref) + 6 * 4 * T

    def one_pass() -> tuple[Tensor, ...]:
        stats, d_hidden, d_weight, _ = linear_grpo_loss.forward(
            hidden,
            weight,
            None,
            targets,
            advantages,
            ref,
            None,
            TEMPERATURE,
            CLIP,
            CLIP,
            KL,
            float(T),
            False,
            *GRADIENTS,
        )
        return stats[0].mean(), d_hidden, d_weight

    def on_logits() -> tuple[Tensor, ...]:
        rows = with_one_more.view(-1, H)
        z = (rows @ weight.T).view(B, L + 1, V).requires_grad_()
        total, *_ = GrpoLossFunction.apply(
            z,
            None,
            ref.view(B, L),
            targets.view(B, L),
            advantages[::L].contiguous(),
            None,
            TEMPERATURE,
            KL,
            CLIP,
            CLIP,
            True,
            "dapo",
        )
        # In place: autograd hands the logits' own memory back as their gradient.
        (dz,) = torch.autograd.grad(total, z)
        dz = dz.view(-1, V)
        return total.detach(), (dz @ weight).view(B, L + 1, H)[:, :L].reshape(T, H), dz.T @ rows

    bench.meter("linear_grpo", "triton", shape, one_pass, (loss.mean(), d_hidden, d_weight), least)
    name = "product, then Liger-Kernel's GRPO loss, then products"
    bench.meter("linear_grpo", name, shape, on_logits, (loss.mean(), d_hidden, d_weight), least)
    return bench.results


def attention_ops(sizes: Sizes) -> list[Measured]:
    """prefix_attention on a group, beside the same kernels on rows that each hold a copy of the prompt."""
    from gadcore.kernels.layout import PrefixLayout
    from gadcore.kernels.prefix_attention import prefix_attention_reference
    from gadcore.kernels.triton import prefix_attention

    bench = _Bench(sizes.cache_bytes)
    P, R, Hq, Hk, D = sizes.attention
    N, scale = sizes.group, D**-0.5
    shared, apart = PrefixLayout.of([P], [[R] * N]), PrefixLayout.of([P] * N, [[R]] * N)
    T, shape = shared.tokens, f"P={P} N={N} R={R} Hq={Hq} Hk={Hk} D={D}"
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(T, heads, D).to(BF16) for heads in (Hq, Hk, Hk, Hq))
    responses = torch.arange(P, T).view(N, R)
    copied = torch.cat([torch.arange(P).expand(N, P), responses], 1).reshape(-1)
    lse_bytes, layout_bytes = 4 * T * Hq, _bytes(shared.offsets, shared.prompt_of)
    forward = _bytes(q, k, v) + layout_bytes + _bytes(q) + lse_bytes
    backward = _bytes(q, k, v, grad) + _bytes(q) + lse_bytes + layout_bytes + _bytes(q, k, v)

    def side(impl: str, layout: PrefixLayout, rows: Tensor) -> None:
        tensors = (q[rows], k[rows], v[rows])
        d_out = grad[rows]
        leaves: Any = [x.float().requires_grad_() for x in tensors]
        true_out = prefix_attention_reference(*leaves, layout, scale, 0)
        gradients = torch.autograd.grad(true_out, leaves, d_out.float())
        counts = (len(layout.prompts), sum(layout.prompts))
        given = (layout.offsets, layout.prompt_of, scale, 0, layout.longest, *counts)
        outputs: list[Tensor] = []

        def attend() -> tuple[Tensor]:
            outputs.extend(prefix_attention.forward(*tensors, *given))
            return (outputs[0],)

        def differentiate() -> tuple[Tensor, ...]:
            return prefix_attention.backward(d_out, *tensors, outputs[0], outputs[1], *given)

        bench.meter("prefix_attention forward", impl, shape, attend, (true_out.detach(),), forward, limited=True)
        bench.meter("prefix_attention backward", impl, shape, differentiate, gradients, backward)

    side("triton", shared, torch.arange(T))
    side("ours on rows with a prompt each (flash-attention-style repeated KV)", apart, copied)
    return bench.results


def score_ops(sizes: Sizes) -> list[Measured]:
    """bt_score, each way, and grpo_ratio_loss. Liger has nothing for the same work."""
    from gadcore.kernels.triton import bt_score, grpo_ratio_loss

    bench = _Bench(sizes.cache_bytes)
    T, H, G, N = sizes.bt_tokens, sizes.bt_width, sizes.bt_groups, sizes.group
    S, shape = G * N, f"T={T} H={H} S={G * N}"
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, H).to(BF16), torch.randn(H) / math.sqrt(H)
    last = torch.randperm(T)[:S].sort().values
    bias, offsets, taught = torch.randn(1), torch.arange(0, S + 1, N), torch.ones(G, dtype=torch.bool)
    scores = hidden[last].float() @ weight + bias
    margin = (scores.view(G, N)[:, :1] - scores.view(G, N)).masked_fill(torch.arange(N) == 0, 0)
    paired = (torch.arange(N) > 0).expand(G, N)
    pair_loss = torch.nn.functional.softplus(-margin) * paired
    slope = torch.sigmoid(-margin) * paired
    slope[:, 0] = -slope.sum(1)
    bench.meter(
        "bt_score forward",
        "triton",
        shape,
        lambda: bt_score.forward(hidden, last, weight, bias, offsets, taught),
        (scores, pair_loss.view(-1), margin.view(-1), slope.view(-1)),
        S * H * 2 + _bytes(weight, last, bias, offsets, taught) + 4 * 4 * S,
        limited=True,
    )
    # Not the slopes: those add up to 0, which leaves no bias gradient to compare.
    grad = torch.randn(S)
    d_hidden = torch.zeros(T, H)
    d_hidden[last] = grad[:, None] * weight
    bench.meter(
        "bt_score backward",
        "triton",
        shape,
        lambda: bt_score.backward(grad, hidden, last, weight),
        (d_hidden, grad @ hidden[last].float(), grad.sum()),
        S * H * 2 + _bytes(grad, last, weight) + T * H * 2 + _bytes(weight) + 4,
        limited=True,
    )
    logprob, advantages, ref, old = (torch.randn(T) for _ in range(4))
    ratio, k3 = (logprob - old).exp(), (ref - logprob).exp() - (ref - logprob) - 1
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    clipped = bounded < ratio * advantages
    loss = -torch.minimum(ratio * advantages, bounded) + KL * k3
    slope = -(ratio * advantages).masked_fill(clipped, 0) + KL * (1 - (ref - logprob).exp())
    bench.meter(
        "grpo_ratio_loss",
        "triton",
        f"T={T}",
        lambda: (grpo_ratio_loss.forward(logprob, advantages, ref, old, CLIP, CLIP, KL),),
        (torch.stack([loss, k3, ratio, clipped.float(), slope]),),
        9 * 4 * T,
        limited=True,
    )
    return bench.results
