"""Log-probabilities of given tokens out of hidden states, without holding [T, V] beyond a budget of bytes.

    z_t = W h_t + bias                                    logits, [V]
    logprob_t = z_t[y_t] / temperature - log sum_v exp(z_t[v] / temperature)
    entropy_t = log sum_v exp(z_t[v] / temperature) - sum_v p_t[v] z_t[v] / temperature,    p_t = softmax(z_t /
    temperature)

Gradient, with g that of logprob and g_t = 0 where y_t = -100:

    d z_t[v] = g_t (1[v = y_t] - p_t[v]) / temperature        d h_t = d z_t W        d W = sum_t d z_t h_t^T

Forward is one matrix product, backward three: the logits are computed again, block by block. On a CPU, where a product
is all that counts, those of the first tokens are held between the two instead, as many as fit keep_bytes: backward is
two products for them. Their memory stays for the next call, since fresh pages would cost more than what is written.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gadcore.kernels.dispatch import Impl, autocast, choose, implementation, without_autocast

# The target of a token that does not count.
IGNORED = -100
# Tokens whose logits the reference holds at a time.
CHUNK_TOKENS = 1024
# Of logits that a CPU holds from forward to backward: those of 1,360 tokens of a vocabulary of 49,152, of 432 of one of
# 151,936. It is an eighth of what weights, gradients and moments of SmolLM2-135M take, the smallest model in use.
KEEP_BYTES = 256 << 20
# The C++ wants rows of held logits whose length is an odd multiple of this: those at powers of two share cache sets.
_LANES = 16


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    keep_bytes: int = KEEP_BYTES,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    keep_bytes: int = KEEP_BYTES,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    keep_bytes: int = KEEP_BYTES,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every target token, and on request the entropy of its distribution.

    hidden: [T, H]; weight: [V, H]; bias: [V] or None; all of one dtype (float32, bfloat16, float16; float64 by the
    reference alone) and any strides; under autocast float32 ones are cast to its dtype. targets: [T] int64 in [0, V),
    or -100: log-probability and entropy 0, no gradient. temperature: above 0. Returns logprob [T], or (logprob,
    entropy [T]); float32 (float64 for float64), accumulated in float32 whatever comes in. Gradients go to hidden,
    weight and bias; entropy carries none. keep_bytes: of float32 logits that "cpu" may hold from this call to its
    backward pass, of as many tokens as fit; the others' are computed again, which makes four products of three. 0 holds
    none, and nothing is held where no gradient is wanted, or by another implementation. impl: "cpu" (native code; the
    memory of held logits and of weight's gradient stays with the process for the next call), "triton" (NVIDIA GPUs),
    "reference" (PyTorch, everywhere), or "auto". Raises ValueError for arguments that do not fit, RuntimeError for an
    `impl` that is not there.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature)
    if keep_bytes < 0:
        raise ValueError(f"keep_bytes must be 0 or more, is {keep_bytes}")
    chosen = choose("linear_logprob", impl, hidden)
    if chosen == "reference":
        logprob, entropy = linear_logprob_reference(hidden, weight, targets, bias, temperature, return_entropy)
    else:
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
        columns = held_columns(len(hidden), len(weight), keep_bytes) if wanted and chosen == "cpu" else 0
        options = (float(temperature), return_entropy, columns, chosen)
        logprob, _, _, entropy, _ = _op(hidden, weight, bias, targets, *options)
    return (logprob, entropy) if return_entropy else logprob


def held_columns(tokens: int, vocabulary: int, keep_bytes: int) -> int:
    """Columns of the [vocabulary, columns] float32 logits that keep_bytes hold, for at most `tokens` tokens."""
    fit = keep_bytes // (4 * vocabulary)
    return max(0, min(-(-(tokens + _LANES) // (2 * _LANES)), (fit + _LANES) // (2 * _LANES)) * 2 * _LANES - _LANES)


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    """The mathematics in PyTorch, CHUNK_TOKENS tokens at a time whose logits are computed again in backward."""
    parts = [
        checkpoint(_chunk, h, weight, bias, y, temperature, return_entropy, use_reentrant=False)
        for h, y in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with without_autocast(hidden):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logprob = _selected(logits, targets, temperature)
    if not return_entropy:
        return logprob, logprob.new_empty(0)
    with torch.no_grad():
        # Shifted by the largest logit, as everything that subtracts nearly equal numbers here.
        z = (logits - logits.amax(1, keepdim=True)) / temperature
        p = z.softmax(-1)
        # A logit of -inf has probability 0 and adds 0, not 0 * inf.
        entropy = z.logsumexp(-1) - (p * z.clamp(min=torch.finfo(z.dtype).min)).sum(-1)
        return logprob, entropy.masked_fill(targets == IGNORED, 0.0)


def _selected(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability [T] of the targets under softmax(logits [T, V] / temperature), 0 where ignored."""
    z = logits / temperature
    ignored = targets == IGNORED
    picked = z.gather(1, targets.masked_fill(ignored, 0)[:, None])
    # The difference of two large numbers that picked - log-sum-exp would be loses digits; shifted, it does not.
    shift = z.detach().amax(1, keepdim=True)
    return ((picked - shift)[:, 0] - (z - shift).logsumexp(1)).masked_fill(ignored, 0.0)


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> None:
    """Raises ValueError where the operands of a language-model head do not fit together."""
    if hidden.dim() != 2 or not hidden.is_floating_point() or hidden.shape[0] == 0:
        raise ValueError(f"hidden must be floating point [T, H] with T >= 1, got {hidden.dtype} {list(hidden.shape)}")
    tokens, width = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, {width}] with V >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{tokens}], got {targets.dtype} {list(targets.shape)}")
    others = [t for t in (weight, bias) if t is not None]
    if any(t.dtype != hidden.dtype for t in others):
        raise ValueError(f"hidden, weight and bias must be of one dtype, are {[t.dtype for t in (hidden, *others)]}")
    if any(t.device != hidden.device for t in (*others, targets)):
        raise ValueError(f"all tensors must be on hidden's device {hidden.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, is {temperature}")


@torch.library.custom_op("gadcore::linear_logprob", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    held_columns: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, row_max, log_sum, entropy, held [V, held_columns]), all but logprob and entropy for the backward pass.

    row_max is the largest logit of a row, log_sum is log sum exp((z - row_max) / temperature). Kept apart, they let
    softmax be computed without losing the digits that a large log-sum-exp would cost. held: the logits, bias included,
    of the first tokens that count, a column each.
    """
    forward = implementation("linear_logprob", impl)
    given = (hidden, weight, bias, targets, temperature, entropy)
    with without_autocast(hidden):
        if impl == "cpu":
            return forward(*given, held_columns)
        return *forward(*given), hidden.new_empty((len(weight), 0), dtype=torch.float32)


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    held_columns: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def rows(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    tokens = hidden.shape[0]
    rest = rows(tokens if entropy else 0), rows(weight.shape[0], held_columns)
    return rows(tokens), rows(tokens), rows(tokens), *rest


@torch.library.custom_op("gadcore::linear_logprob_backward", mutates_args=())
def _op_backward(
    grad_logprob: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    held: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight, d bias), empty where not needed."""
    backward = implementation("linear_logprob", impl, "backward")
    given = (grad_logprob, hidden, weight, bias, targets, row_max, log_sum)
    return backward(*given, *((held,) if impl == "cpu" else ()), temperature, need_hidden, need_weight, need_bias)


@_op_backward.register_fake
def _(
    grad_logprob: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    held: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_gradients(hidden, weight, need_hidden, need_weight, need_bias)


def head_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of a head, empty where none is needed."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.temperature, _, _, ctx.impl = inputs
    _, row_max, log_sum, entropy, held = output
    ctx.mark_non_differentiable(row_max, log_sum, entropy, held)
    # Else backward would be handed zeros of the held logits' size.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, row_max, log_sum, held)


def _backward(ctx: Any, grad_logprob: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logprob is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[:3]
    gradients = _op_backward(grad_logprob, *ctx.saved_tensors, ctx.temperature, *needs, ctx.impl)
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, d_bias, *[None] * 5


_op.register_autograd(_backward, setup_context=_setup_context)
