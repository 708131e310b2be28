"""Attention of the last token of every response alone, for a layer whose other outputs nobody reads.

The last token of a response sees its whole prompt and its whole response (kernels/prefix_attention.py states the
mathematics), so one query per response needs no causal mask, and keys and values of a prompt are read in place by all
of its responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gadcore.kernels.dispatch import without_autocast
from gadcore.kernels.layout import PrefixLayout


def last_token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention [S, Hq, D] of the last tokens of all S responses of `layout`, in its order.

    query: [S, Hq, D]; key, value: [T, Hk, D] of all packed tokens. scale, window, dtypes and gradients as for
    prefix_attention. Raises ValueError for shapes that do not fit.
    """
    counts = [len(responses) for responses in layout.responses]
    if query.dim() != 3 or len(query) != sum(counts) or key.shape != value.shape or len(key) != layout.tokens:
        raise ValueError(
            f"query must be [{sum(counts)}, Hq, D], key and value [{layout.tokens}, Hk, D], "
            f"got {[list(x.shape) for x in (query, key, value)]}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    begin = segment = 0
    with without_autocast(query):
        for queries, prompt, responses in zip(query.split(counts), layout.prompts, layout.responses, strict=True):
            if responses:
                # Of the device's own: the host's lengths would have to be copied there, for every group anew.
                lengths = layout.offsets[segment + 1 : segment + 2 + len(responses)].diff()
                outs.append(_one_group(queries, key, value, begin, prompt, lengths, max(responses), scale, window))
            begin, segment = begin + prompt + sum(responses), segment + 1 + len(responses)
    return torch.cat(outs)


def _one_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin: int,
    prompt: int,
    lengths: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    samples, heads, width = query.shape
    kv_heads, device = key.shape[1], query.device
    starts = begin + prompt + lengths.cumsum(0) - lengths
    step = torch.arange(longest, device=device)
    # Own tokens side by side [S, longest]: what a shorter response lacks points at its first token and is hidden.
    beyond = step >= lengths[:, None]
    own = (starts[:, None] + step).masked_fill(beyond, 0)
    hidden = torch.cat([beyond.new_zeros(samples, prompt), beyond], 1)
    if window:
        position = torch.arange(hidden.shape[1], device=device)
        hidden = hidden | (position <= (prompt + lengths - 1)[:, None] - window)
    q = query.reshape(samples, kv_heads, heads // kv_heads, width)
    prompt_key, prompt_value = (x[begin : begin + prompt] for x in (key, value))
    own_key, own_value = (x.index_select(0, own.flatten()).unflatten(0, own.shape) for x in (key, value))
    scores = torch.cat([torch.einsum("shgd,phd->shgp", q, prompt_key), torch.einsum("shgd,srhd->shgr", q, own_key)], -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    weight = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).to(value.dtype)
    shared, alone = weight.split([prompt, own.shape[1]], -1)
    out = torch.einsum("shgp,phd->shgd", shared, prompt_value) + torch.einsum("shgr,srhd->shgd", alone, own_value)
    return out.reshape(query.shape)
