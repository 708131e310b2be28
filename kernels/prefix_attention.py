"""Attention of packed groups: every response sees its whole prompt and, causally, itself.

    s[i, j] = scale q_i . k_j        for the keys j that token i sees, else -inf
    out_i   = sum_j softmax_j(s[i, :]) v_j

Token i sees the tokens of its own segment up to itself and, where it belongs to a response, all tokens of its prompt;
with a window only those at most window - 1 positions before it. Keys and values of a prompt exist once, however many
responses and query heads read them. Backward, with P the softmax and D_i = d out_i . out_i:

    d v_j = sum_i P[i, j] d out_i      d s[i, j] = P[i, j] (d out_i . v_j - D_i)
    d q_i = scale sum_j d s[i, j] k_j       d k_j = scale sum_i d s[i, j] q_i
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.dispatch import Impl, choose, flash_missing, implementation, without_autocast
from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.ops import OPS


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    impl: Impl | Literal["flash"] = "auto",
) -> Tensor:
    """Attention [T, Hq, D] over the packed groups of `layout`.

    query: [T, Hq, D]; key, value: [T, Hk, D], Hq a multiple of Hk (query head h reads the keys of head h // (Hq / Hk));
    of one dtype and any strides. scale: default 1 / sqrt(D). window: positions that a token sees, itself included;
    None: all. Gradients go to query, key and value. "cpu" computes float32, "triton" float32, bfloat16 and float16 with
    D of 64, 96 or 128, "flash" the latter two without a window, on sm_90 and sm_100, "reference" everything, with a
    dense mask. "auto" on a GPU is "triton", and "flash" from FLASH_TOKENS on where it is installed. Raises ValueError
    for arguments that do not fit, RuntimeError for an `impl` that is not there.
    """
    _check(query, key, value, layout, window)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    # A window that is longer than every sequence hides nothing.
    window = 0 if window is None or window >= layout.longest else window
    if impl == "auto" and query.is_cuda and query.shape[-1] not in HEAD_SIZES:
        impl = "reference"
    chosen = _chosen(impl, query, layout.longest, window)
    if chosen == "reference":
        return prefix_attention_reference(query, key, value, layout, scale, window)
    counts = len(layout.prompts), sum(layout.prompts)
    out, _ = _op(query, key, value, layout.offsets, layout.prompt_of, scale, window, layout.longest, *counts, chosen)
    return out


# What the GPU kernels are made for.
HEAD_SIZES = (64, 96, 128)
# Positions of the longest sequence from which FlashAttention is worth two calls for one: attention is then a tenth of a
# step and more, of which it takes off a part; below, hardly anything.
FLASH_TOKENS = 3072


def _chosen(impl: str, query: Tensor, longest: int, window: int) -> str:
    """As dispatch.choose, with FlashAttention, which dispatch does not know."""
    if impl == "flash":
        if (reason := _not_by_flash(query, window)) is not None:
            raise ValueError(f'prefix_attention: impl="flash" {reason}')
        if (reason := flash_missing()) is not None:
            raise RuntimeError(f'prefix_attention: impl="flash" is not available: {reason}')
        return "flash"
    chosen = choose("prefix_attention", impl, query)  # type: ignore[arg-type]
    long = impl == "auto" and chosen == "triton" and longest >= FLASH_TOKENS
    return "flash" if long and _not_by_flash(query, window) is None and flash_missing() is None else chosen


def _not_by_flash(query: Tensor, window: int) -> str | None:
    """None where FlashAttention computes such a call, else why it does not."""
    dtypes = OPS["prefix_attention"].flash
    if query.dtype not in dtypes or query.shape[-1] not in HEAD_SIZES:
        return f"computes in {', '.join(map(str, dtypes))} with D of {HEAD_SIZES}, got {query.dtype} {query.shape[-1]}"
    if window:
        return "computes no window"
    if not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] not in (9, 10):
        return f"needs tensors on a GPU of sm_90 or sm_100, got {query.device}"
    return None


def prefix_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float, window: int
) -> Tensor:
    """The mathematics in PyTorch, with a dense mask per group. window 0: none."""
    outs = []
    begin = 0
    for prompt, responses in zip(layout.prompts, layout.responses, strict=True):
        lengths = torch.tensor([prompt, *responses], device=query.device)
        end = begin + prompt + sum(responses)
        segment = torch.repeat_interleave(lengths, output_size=end - begin)
        row = torch.arange(end - begin, device=query.device)
        sees = ((segment == segment[:, None]) | (segment == 0)) & (row <= row[:, None])
        if window:
            position = layout.positions[begin:end]
            sees &= position > position[:, None] - window
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        with without_autocast(query):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        begin = end
    return torch.cat(outs)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, window: int | None) -> None:
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            f"query must be [T, Hq, D], key and value [T, Hk, D], got {[list(x.shape) for x in (query, key, value)]}"
        )
    tokens, heads, width = query.shape
    if key.shape[0] != tokens or key.shape[2] != width or key.shape[1] < 1 or heads % key.shape[1]:
        raise ValueError(f"key must be [{tokens}, Hk, {width}] with Hk a divisor of {heads}, got {list(key.shape)}")
    if tokens != layout.tokens:
        raise ValueError(f"the layout holds {layout.tokens} tokens, query {tokens}")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must be of one dtype, are {[x.dtype for x in (query, key, value)]}")
    if any(x.device != query.device for x in (key, value, layout.offsets)):
        raise ValueError(f"all tensors must be on query's device {query.device}")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more, is {window}")


@torch.library.custom_op("gadcore::prefix_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    prompt_of: Tensor,
    scale: float,
    window: int,
    longest: int,
    prompts: int,
    prompt_tokens: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse), lse [T, Hq] float32 the natural log of the sum of exp(s[i, :]), for the backward pass.

    prompts, prompt_tokens: how many there are in the layout.
    """
    forward = implementation("prefix_attention", impl)
    counts = () if impl == "cpu" else (prompts, prompt_tokens)
    return forward(query, key, value, offsets, prompt_of, scale, window, longest, *counts)


@_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    prompt_of: Tensor,
    scale: float,
    window: int,
    longest: int,
    prompts: int,
    prompt_tokens: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("gadcore::prefix_attention_backward", mutates_args=())
def _op_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    prompt_of: Tensor,
    scale: float,
    window: int,
    longest: int,
    prompts: int,
    prompt_tokens: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d query, d key, d value)."""
    backward = implementation("prefix_attention", impl, "backward")
    # What a GPU cuts its work by: nothing waits for it to learn these from the offsets.
    counts = () if impl == "cpu" else (prompts, prompt_tokens)
    return backward(grad_out, query, key, value, out, lse, offsets, prompt_of, scale, window, longest, *counts)


@_op_backward.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    prompt_of: Tensor,
    scale: float,
    window: int,
    longest: int,
    prompts: int,
    prompt_tokens: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, offsets, prompt_of, *ctx.constants = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, offsets, prompt_of)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    gradients = _op_backward(grad_out, *ctx.saved_tensors, *ctx.constants)
    return *gradients, None, None, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
