"""Log-probabilities of given tokens under softmax(logits / T).

    z = logits / T                      [T, V]
    lse_t = log sum_v exp(z_tv)         [T]
    logprob_t = z_t,target_t - lse_t    [T], 0 where target_t = -100

Gradients, with g and h those of logprob and lse, and g = 0 where target_t = -100:

    d logits_tv = (g_t 1[v = target_t] + (h_t - g_t) softmax(z_t)_v) / T
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose

IGNORED = -100


class SelectedLogprob(NamedTuple):
    """logprob: [T]. lse: [T], of logits / T. float32, or float64 where the reference was given float64."""

    logprob: Tensor
    lse: Tensor


def selected_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0, impl: Impl = "auto") -> SelectedLogprob:
    """Log-probability of one token per row, differentiable in the logits.

    logits: [T, V], V > 0, any floating type and strides. targets: [T] int64 below V; -100 gives logprob 0 and passes
    no gradient to its row. temperature: above 0.
    impl: "cpu" is the native op for float32 on the CPU; "auto" takes it where it fits and was built, else "reference".
    Raises ValueError for wrong arguments, RuntimeError for a target outside the vocabulary or an `impl` that is not
    there.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [T, V] with V > 0, got {logits.dtype} {list(logits.shape)}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{logits.shape[0]}], got {targets.dtype} {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, is {temperature}")
    chosen = choose("selected_logprob", impl, logits, native="selected_logprob", triton=False, dtypes=(torch.float32,))
    # The op has no shapes of its own for meta tensors before the library is there.
    if chosen == "cpu" and not logits.is_meta:
        logprob, lse, _, _ = _op()(logits, targets, float(temperature))
        return SelectedLogprob(logprob, lse)
    return selected_logprob_reference(logits, targets, temperature)


def selected_logprob_reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> SelectedLogprob:
    """The mathematics in PyTorch, for every device; holds a few [T, V] temporaries."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    ignored = targets == IGNORED
    picked = z.gather(1, targets.masked_fill(ignored, 0)[:, None])
    # The difference of two large numbers that picked - lse would be loses digits; shifted, it does not.
    shift = z.detach().amax(1, keepdim=True)
    log_sum = (z - shift).logsumexp(1)
    logprob = (picked - shift)[:, 0] - log_sum
    return SelectedLogprob(logprob.masked_fill(ignored, 0.0), shift[:, 0] + log_sum)


@functools.cache
def _op() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The native op with its shapes for meta tensors and its gradient, registered once.

    It gives (logprob, lse, row_max, log_sum); the last two, the largest logit of a row and log sum exp((x - max) / T),
    are for the backward pass, which is exact for large logits thanks to them. They carry no gradient of their own.
    """

    def fake(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = logits.shape[0]
        return logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows)

    def fake_backward(
        grad_logprob: Tensor,
        grad_lse: Tensor,
        logits: Tensor,
        targets: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        temperature: float,
    ) -> Tensor:
        return logits.new_empty(logits.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, targets, ctx.temperature = inputs
        _, _, row_max, log_sum = output
        ctx.mark_non_differentiable(row_max, log_sum)
        ctx.save_for_backward(logits, targets, row_max, log_sum)

    def backward(ctx: Any, grad_logprob: Tensor, grad_lse: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        grad = torch.ops.gadcore.selected_logprob_backward(grad_logprob, grad_lse, *ctx.saved_tensors, ctx.temperature)
        return grad, None, None

    torch.library.register_fake("gadcore::selected_logprob", fake)
    torch.library.register_fake("gadcore::selected_logprob_backward", fake_backward)
    torch.library.register_autograd("gadcore::selected_logprob", backward, setup_context=setup_context)
    return torch.ops.gadcore.selected_logprob.default
