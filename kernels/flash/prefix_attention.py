"""prefix_attention by the varlen calls of FlashAttention (the package flash-attn-4), for long sequences on a GPU.

Every segment attends to itself, causally, in a first call; the responses of a group to their prompt, without a mask, in
a second one. Both read query, key and value where they lie. With out_1, lse_1 and out_2, lse_2 of the two,

    lse = log(exp lse_1 + exp lse_2)        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

is the attention over both sets of keys. Backward calls each again with the merged out and lse: P = exp(s - lse) and
D = d out . out are then those of the whole softmax, so the gradients of queries and of prompts' keys are the sums of
those of both calls. The calls are asked for their deterministic backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.triton._flash_merge import add_rows, merge


def _calls() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of a varlen call. The public function keeps out and lse for its own backward pass alone."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


class _Cross(NamedTuple):
    """Sequences 2 g and 2 g + 1 of the second call: the rows of prompt g, which see nothing there, and those of its
    responses, which see it. queries, keys: [2 G + 1]; used: [2 G] of the keys; all int32."""

    queries: Tensor
    keys: Tensor
    used: Tensor

    @classmethod
    def of(cls, offsets: Tensor, prompt_of: Tensor, prompts: int) -> _Cross:
        own = torch.arange(len(prompt_of), device=offsets.device)
        # The segments that are prompts, without waiting for the device to count them.
        counted = (prompt_of == own).cumsum(0)
        segment = torch.searchsorted(counted, torch.arange(1, prompts + 1, device=offsets.device))
        begin, after = offsets[segment], offsets[segment + 1]
        end = torch.cat([begin[1:], offsets[-1:]])
        queries = torch.cat([begin[:1], torch.stack([after, end], 1).flatten()])
        keys = torch.cat([begin[:1], torch.stack([begin, end], 1).flatten()])
        used = torch.stack([torch.zeros_like(begin), after - begin], 1).flatten()
        return cls(queries.int(), keys.int(), used.int())


def forward(
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
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D] in the dtype of query, lse [T, Hq] float32). Arguments as kernels/prefix_attention.py's op has
    them, in bf16 or fp16; window: 0."""
    attend, _ = _calls()
    T, cu = query.shape[0], offsets.int()
    lengths: dict[str, Any] = dict(softmax_scale=scale, return_lse=True)
    own = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
    out, lse, *_ = attend(query, key, value, **own, **lengths)
    if len(prompt_of) > prompts:
        cross = _Cross.of(offsets, prompt_of, prompts)
        seen, seen_lse, *_ = attend(query, key, value, **_lengths(cross, T, longest), causal=False, **lengths)
        out, lse = merge(out, lse, seen, seen_lse)
    return out, lse.T.contiguous()


def backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(d query, d key, d value) in the dtypes and shapes of what they belong to. out, lse: forward's."""
    _, differentiate = _calls()
    cu, given = offsets.int(), (query, key, value, out, grad_out.contiguous(), lse.T.contiguous(), scale)
    own = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)

    def gradients(causal: bool, lengths: dict[str, Any]) -> list[Tensor]:
        into = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        names = dict(zip(("dq", "dk", "dv"), into, strict=True))
        differentiate(*given, causal=causal, deterministic=True, **lengths, **names)
        return into

    d_query, d_key, d_value = gradients(True, own)
    if len(prompt_of) > prompts:
        cross = _Cross.of(offsets, prompt_of, prompts)
        more = gradients(False, _lengths(cross, query.shape[0], longest))
        # Of the rest of its rows neither call says anything.
        add_rows(d_query, more[0], offsets, prompt_of, of_prompts=False)
        add_rows(d_key, more[1], offsets, prompt_of, of_prompts=True)
        add_rows(d_value, more[2], offsets, prompt_of, of_prompts=True)
    return d_query, d_key, d_value


def _lengths(cross: _Cross, tokens: int, longest: int) -> dict[str, Any]:
    cu = dict(cu_seqlens_q=cross.queries, cu_seqlens_k=cross.keys, seqused_k=cross.used)
    return dict(**cu, max_seqlen_q=tokens, max_seqlen_k=longest)
