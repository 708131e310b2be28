"""The GPU side of prefix_attention in Triton: one launch forward, two or three backward.

A response is a causal sequence of P + R positions whose first P keys lie with its prompt, so a program walks positions
and takes each key from where it lies: no copy of the prompt, and no seam between two passes that would have to be
merged. The rows of a tile are (token, query head) pairs of one key head, token by token: whatever the number of query
heads is, a key is loaded once for all of them, and a short response still fills a tile.

    _attention_kernel     a tile of rows over the keys that they see: out, lse
    _d_query_kernel       the same walk: D, d query
    _d_key_value_kernel   a tile of keys over the rows that see it: d key, d value. The rows that see a prompt are those
                          of the prompt and of all its responses, which follow it: one range without a gap, cut into
                          parts where its tiles would keep the others waiting (_prefix_keys.py).
    _sum_parts_kernel     the parts of the prompts' d key and d value, in their order

Programs are numbered so that every segment has enough of them whatever its length: each finds its own segment by
counting, and nothing about the layout has to be known on the host. Some programs find nothing to do. Every sum is
formed by one program in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.prefix_attention import HEAD_SIZES
from gadcore.kernels.triton._prefix_keys import SUM_ROWS, _d_key_value_kernel, _sum_parts_kernel, parts_of
from gadcore.kernels.triton._prefix_tiles import D_QUERY, FORWARD, autotune
from gadcore.kernels.triton._prefix_walk import (
    key_tokens,
    load_rows,
    place,
    prefix_of,
    row_start,
    sees_keys,
    span_of,
    store_rows,
    walk_bounds,
)
from gadcore.kernels.triton._shared import LN2, LOG2E, num_sms, on_its_device

# Below every logit, and still a number: rows that have seen no key yet need no care.
LOWEST = tl.constexpr(-3.0e38)


# ---- forward ----------------------------------------------------------------------------------------------------


@autotune(FORWARD)
@triton.jit(do_not_specialize=["segments", "window"])
def _attention_kernel(
    query,
    key,
    value,
    offsets,
    prompt_of,
    out,
    lse,
    segments,
    window,
    scale2,
    stride_query,
    stride_key,
    stride_value,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """scale2: log2(e) scale. Strides: as `_at` takes them. HEADS: key heads; GROUP: query heads of each."""
    head, segment, first = place(offsets, segments, HEADS, GROUP, BM)
    begin, length = span_of(offsets, segment)
    if first >= length * GROUP:
        return
    prompt_begin, prefix = prefix_of(offsets, prompt_of, segment)
    # Rows past the end are the last one once more.
    row = tl.minimum(first + tl.arange(0, BM), length * GROUP - 1)
    position = prefix + row // GROUP
    token, query_head = begin + row // GROUP, head * GROUP + row % GROUP
    q = load_rows(query, row_start(stride_query, token, query_head), D, WIDTH)

    acc = tl.zeros((BM, WIDTH), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    # Of log2(e) s, like the exponents of `acc` and `total`.
    row_max = tl.full((BM,), LOWEST, tl.float32)
    start, bound = walk_bounds(prefix + first // GROUP, window, WINDOWED, BN)
    end = prefix + tl.minimum((first + BM - 1) // GROUP + 1, length)
    # Tiles that every row sees as a whole, then those that need the mask.
    for MASKED in tl.static_range(1 if WINDOWED else 0, 2):
        for n in range(bound if MASKED else start, end if MASKED else bound, BN):
            key_position, key_token = key_tokens(n, end, begin, prompt_begin, prefix, BN)
            k = load_rows(key, row_start(stride_key, key_token, head), D, WIDTH)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if MASKED:
                sees = sees_keys(position[:, None], key_position[None, :], window, WINDOWED)
                s = tl.where(sees, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            total = total * decay + tl.sum(p, 1)
            row_max = new_max
            v = load_rows(value, row_start(stride_value, key_token, head), D, WIDTH)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    inside = first + tl.arange(0, BM) < length * GROUP
    at = token * (HEADS * GROUP) + query_head
    store_rows(out, at * D, acc / total[:, None], inside, D, WIDTH)
    tl.store(lse + at, row_max * LN2 + tl.log(total), mask=inside)


# ---- backward ---------------------------------------------------------------------------------------------------


@autotune(D_QUERY)
@triton.jit(do_not_specialize=["segments", "window"])
def _d_query_kernel(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    offsets,
    prompt_of,
    d_query,
    delta,
    segments,
    window,
    scale,
    scale2,
    stride_grad,
    stride_query,
    stride_key,
    stride_value,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """d query, and delta [T, Hq], the D_i of the equations, for `_d_key_value_kernel`. out: contiguous."""
    head, segment, first = place(offsets, segments, HEADS, GROUP, BM)
    begin, length = span_of(offsets, segment)
    if first >= length * GROUP:
        return
    prompt_begin, prefix = prefix_of(offsets, prompt_of, segment)
    row = tl.minimum(first + tl.arange(0, BM), length * GROUP - 1)
    inside = first + tl.arange(0, BM) < length * GROUP
    position = prefix + row // GROUP
    token, query_head = begin + row // GROUP, head * GROUP + row % GROUP
    at = token * (HEADS * GROUP) + query_head
    d_out = load_rows(grad_out, row_start(stride_grad, token, query_head), D, WIDTH)
    row_delta = tl.sum(load_rows(out, at * D, D, WIDTH).to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=inside)
    q = load_rows(query, row_start(stride_query, token, query_head), D, WIDTH)
    lse2 = tl.load(lse + at) * LOG2E

    acc = tl.zeros((BM, WIDTH), tl.float32)
    start, bound = walk_bounds(prefix + first // GROUP, window, WINDOWED, BN)
    end = prefix + tl.minimum((first + BM - 1) // GROUP + 1, length)
    for MASKED in tl.static_range(1 if WINDOWED else 0, 2):
        for n in range(bound if MASKED else start, end if MASKED else bound, BN):
            key_position, key_token = key_tokens(n, end, begin, prompt_begin, prefix, BN)
            k = load_rows(key, row_start(stride_key, key_token, head), D, WIDTH)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse2[:, None])
            if MASKED:
                p = tl.where(sees_keys(position[:, None], key_position[None, :], window, WINDOWED), p, 0.0)
            v = load_rows(value, row_start(stride_value, key_token, head), D, WIDTH)
            dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    store_rows(d_query, at * D, acc * scale, inside, D, WIDTH)


# ---- launches ---------------------------------------------------------------------------------------------------


def _readable(x: Tensor) -> Tensor:
    """x [T, heads, D] itself where every row can be read 16 bytes at a time, else a copy."""
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _constants(query: Tensor, key: Tensor, scale: float, window: int) -> dict[str, Any]:
    """What all kernels are compiled for. Raises ValueError for what they do not compute."""
    D = query.shape[2]
    if D not in HEAD_SIZES:
        raise ValueError(f"the Triton kernels of prefix_attention have a head size of {HEAD_SIZES}, got {D}")
    if not scale > 0:
        raise ValueError(f"the Triton kernels of prefix_attention need a positive scale, got {scale}")
    return {
        "HEADS": key.shape[1],
        "GROUP": query.shape[1] // key.shape[1],
        "D": D,
        "WIDTH": triton.next_power_of_2(D),
        "WINDOWED": window > 0,
    }


def _grid(tokens: int, segments: int, per_token: int, block: str, heads: int) -> Callable[[dict[str, int]], Any]:
    return lambda config: ((tokens * per_token // config[block] + segments) * heads,)


@on_its_device
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
    """(out [T, Hq, D] in the dtype of query, lse [T, Hq] float32), in one launch.

    query: [T, Hq, D]; key, value: [T, Hk, D]; all fp32, bf16 or fp16 with D of 64, 96 or 128, any strides, but those
    that `_readable` cannot read are copied. offsets: [K + 1] int64; prompt_of: [K] int64, as in PrefixLayout. scale:
    above 0. window: 0 for none. lse: natural log of the sum of exp(s). longest, prompts, prompt_tokens: of the layout,
    not needed. Raises ValueError.
    """
    constants = _constants(query, key, scale, window)
    query, key, value = _readable(query), _readable(key), _readable(value)
    (T, Hq, _), segments = query.shape, prompt_of.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=query.device)
    _attention_kernel[_grid(T, segments, constants["GROUP"], "BM", constants["HEADS"])](
        query,
        key,
        value,
        offsets.contiguous(),
        prompt_of.contiguous(),
        out,
        lse,
        segments,
        window,
        scale * LOG2E.value,
        *(x.stride()[:2] for x in (query, key, value)),
        **constants,
    )
    return out, lse


@on_its_device
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
    """(d query, d key, d value) in the dtypes and shapes of what they belong to, contiguous, in two or three launches.

    grad_out: [T, Hq, D] of any strides; out, lse: forward's; prompts, prompt_tokens: how many there are in the layout;
    the rest as in `forward`.
    """
    constants = _constants(query, key, scale, window)
    grad_out, query, key, value = _readable(grad_out), _readable(query), _readable(key), _readable(value)
    offsets, prompt_of = offsets.contiguous(), prompt_of.contiguous()
    (T, Hq, _), segments = query.shape, prompt_of.shape[0]
    d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    delta = torch.empty(T, Hq, dtype=torch.float32, device=query.device)
    strides = (x.stride()[:2] for x in (grad_out, query, key, value))
    numbers = (window, scale, scale * LOG2E.value, *strides)
    heads, tokens = constants["HEADS"], T - prompt_tokens
    _d_query_kernel[_grid(T, segments, constants["GROUP"], "BM", heads)](
        grad_out,
        query,
        key,
        value,
        out.contiguous(),
        lse.contiguous(),
        offsets,
        prompt_of,
        d_query,
        delta,
        segments,
        *numbers,
        **constants,
    )
    parts = parts_of(T, prompts, prompt_tokens, segments, heads, num_sms(query.device))
    shape = (2, parts, prompt_tokens if parts > 1 else 0, heads, query.shape[2])
    key_parts, value_parts = torch.empty(shape, dtype=torch.float32, device=query.device)

    def grid(config: dict[str, int]) -> tuple[int]:
        of_prompts = prompt_tokens // config["BN"] + prompts
        return ((of_prompts * parts + tokens // config["BN"] + segments - prompts) * heads,)

    _d_key_value_kernel[grid](
        grad_out,
        query,
        key,
        value,
        lse.contiguous(),
        delta,
        offsets,
        prompt_of,
        d_key,
        d_value,
        key_parts,
        value_parts,
        segments,
        prompts,
        prompt_tokens,
        parts,
        *numbers,
        **constants,
    )
    if parts > 1:
        _sum_parts_kernel[((prompt_tokens // SUM_ROWS + prompts) * heads,)](
            key_parts,
            value_parts,
            offsets,
            prompt_of,
            d_key,
            d_value,
            segments,
            prompt_tokens,
            parts,
            scale,
            HEADS=heads,
            D=constants["D"],
            WIDTH=constants["WIDTH"],
            ROWS=SUM_ROWS,
        )
    return d_query, d_key, d_value
