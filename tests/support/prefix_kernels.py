"""What the tests of the Triton kernels of prefix_attention share: ragged groups, the float64 truth, everything at once.

Imports the kernels: only for processes of Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.triton import prefix_attention as kernels
from tests.support.kernel_grid import F64, relative_error

BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]
# Outputs are rounded to the inputs' dtype, and so are the probabilities that a product takes.
OUT = {torch.float32: 1e-5, BF16: 1e-2, torch.float16: 1e-3}
GRADIENT = {torch.float32: 2e-5, BF16: 2e-2, torch.float16: 2e-3}
KERNELS = ("_attention_kernel", "_d_query_kernel", "_d_key_value_kernel")

# A prompt of one token, responses of one token, a prompt without responses, lengths on both sides of a tile.
RAGGED = PrefixLayout.of([1, 19, 7], [[5], [17, 33, 1], []])


def inputs(layout: PrefixLayout, heads: tuple[int, int], D: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(layout.tokens + D)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(layout.tokens, n, D, generator=generator).to(dtype) for n in counts]


def truth(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """out and lse in float64, with one dense mask over all tokens that is written from the definition."""
    lengths = layout.offsets.diff()
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    at = layout.positions
    sees = (segment == segment[:, None]) | (segment == layout.prompt_of[segment][:, None])
    sees &= at <= at[:, None]
    if window:
        sees &= at > at[:, None] - window
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k).mul(scale).masked_fill(~sees, -math.inf)
    return torch.einsum("hij,jhd->ihd", s.softmax(-1), v), s.logsumexp(-1).T


def run(tensors: Sequence[Tensor], layout: PrefixLayout, scale: float, window: int) -> tuple[Tensor, ...]:
    """out, lse, d query, d key, d value."""
    q, k, v, grad = tensors
    counts = (len(layout.prompts), sum(layout.prompts))
    rest = (layout.offsets, layout.prompt_of, scale, window, layout.longest, *counts)
    out, lse = kernels.forward(q, k, v, *rest)
    return out, lse, *kernels.backward(grad, q, k, v, out, lse, *rest)


def check(tensors: Sequence[Tensor], layout: PrefixLayout, *, scale: float = 0.125, window: int = 0) -> None:
    """Everything against float64."""
    dtype = tensors[0].dtype
    out, lse, *gradients = run(tensors, layout, scale, window)
    leaves = [x.detach().to(F64).requires_grad_() for x in tensors[:3]]
    true_out, true_lse = truth(*leaves, layout, scale, window)
    true_gradients = torch.autograd.grad(true_out, leaves, tensors[3].to(F64))
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, true_out.detach(), 1.0) <= OUT[dtype]
    assert relative_error(lse, true_lse.detach(), 1.0) <= 1e-5
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        # 1 at least: where a token sees one key alone, gradients of query and key are 0.
        assert relative_error(actual, expected, 1.0) <= GRADIENT[dtype]
