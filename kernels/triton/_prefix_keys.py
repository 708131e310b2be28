"""d key and d value of prefix_attention.py: a tile of keys over the rows that see it.

A prompt's keys are seen by every row of its group, a response's by its own alone. So that the few tiles of a prompt
keep no machine waiting, the rows that see them are cut into parts, a program each, and the parts are added up by a
second kernel in their order: the same bits on every run.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from gadcore.kernels.triton._prefix_tiles import D_KEY_VALUE, autotune
from gadcore.kernels.triton._prefix_walk import (
    load_rows,
    members_of,
    place_among,
    prefix_of,
    row_start,
    sees_keys,
    span_of,
    store_rows,
)
from gadcore.kernels.triton._shared import LOG2E

# Keys of a prompt that a program of _sum_parts_kernel adds up.
SUM_ROWS = 16
# Parts are written and read in fp32 once: more of them than these cost more than they even out.
MOST_PARTS = 8
# The longest program takes at most this share of the time that all of them take together.
LONGEST = 0.5


def parts_of(tokens: int, prompts: int, prompt_tokens: int, segments: int, heads: int, sms: int) -> int:
    """Into how many parts the rows that see a prompt's keys are cut; by the work of groups of the mean size.

    Counted in rows that a tile of 128 keys walks, whatever the tile is: tiles of a prompt walk the whole group but for
    what stands before them, those of a response their own rest.
    """
    group, prompt = tokens / prompts, prompt_tokens / prompts
    responses = (segments - prompts) / prompts
    response = (group - prompt) / responses if responses else 0.0
    of_prompt = math.ceil(prompt / 128) * (group - prompt / 2)
    of_responses = responses * math.ceil(response / 128) * response / 2
    share = heads * prompts * (of_prompt + of_responses) / sms
    return max(1, min(MOST_PARTS, math.ceil(group / (LONGEST * share))))


@autotune(D_KEY_VALUE)
@triton.jit(do_not_specialize=["segments", "prompts", "prompt_tokens", "parts", "window"])
def _d_key_value_kernel(
    grad_out,
    query,
    key,
    value,
    lse,
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
    """key_parts, value_parts: [parts, prompt_tokens, HEADS, D] fp32, of all prompts one after the other; unscaled.

    The long programs, those of prompts, start first.
    """
    head, program = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    split = (prompt_tokens // BN + prompts) * parts
    of_prompt = program < split
    part = tl.where(of_prompt, program % parts, 0)
    parts = tl.where(of_prompt, parts, 1)
    at_place = tl.where(of_prompt, program // parts, program - split)
    segment, first, before = place_among(offsets, prompt_of, segments, of_prompt, at_place, BN)
    begin, length = span_of(offsets, segment)
    if first >= length:
        return
    _, prefix = prefix_of(offsets, prompt_of, segment)
    members = members_of(prompt_of, segments, segment)
    key_position = prefix + first + tl.arange(0, BN)
    key_token = begin + tl.minimum(first + tl.arange(0, BN), length - 1)
    k = load_rows(key, row_start(stride_key, key_token, head), D, WIDTH)
    v = load_rows(value, row_start(stride_value, key_token, head), D, WIDTH)

    dk = tl.zeros((BN, WIDTH), tl.float32)
    dv = tl.zeros((BN, WIDTH), tl.float32)
    # Without a window the segments that see these keys are one range, of which a part is a range. With one, each is
    # seen from a part of its own: parts take turns.
    for member in range(segment + (part if WINDOWED else 0), segment + (members if WINDOWED else 1), parts):
        if WINDOWED:
            row_begin, stop = span_of(offsets, member)
            row_prefix = tl.where(member == segment, prefix, length)
            start = tl.where(member == segment, first, 0)
            stop = tl.minimum(stop, prefix + first + BN - 1 + window - row_prefix)
        else:
            row_begin, row_prefix, start = begin, prefix, first
            stop = (tl.load(offsets + segment + members) - begin).to(tl.int32)
        count = stop * GROUP
        low = start * GROUP
        # Rows from here on see all of the tile.
        bound = count
        if not WINDOWED:
            bound = low + tl.cdiv((BN - 1) * GROUP, BM) * BM
            own = tl.cdiv(tl.cdiv(count - low, BM), parts) * BM
            low += part * own
            count = tl.minimum(low + own, count)
            bound = tl.minimum(tl.maximum(bound, low), count)
        for WHOLE in tl.static_range(0, 1 if WINDOWED else 2):
            for m in range(bound if WHOLE else low, count if WHOLE else bound, BM):
                # Rows past the end are the last one once more, with a probability of 0.
                row = tl.minimum(m + tl.arange(0, BM), count - 1)
                token, query_head = row_begin + row // GROUP, head * GROUP + row % GROUP
                at = token * (HEADS * GROUP) + query_head
                lse2 = tl.load(lse + at, mask=m + tl.arange(0, BM) < count, other=float("inf")) * LOG2E
                q = load_rows(query, row_start(stride_query, token, query_head), D, WIDTH)
                p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse2[None, :])
                if not WHOLE:
                    position = row_prefix + row // GROUP
                    p = tl.where(sees_keys(position[None, :], key_position[:, None], window, WINDOWED), p, 0.0)
                d_out = load_rows(grad_out, row_start(stride_grad, token, query_head), D, WIDTH)
                dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
                ds = p * (dp - tl.load(delta + at)[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    inside = first + tl.arange(0, BN) < length
    if parts > 1:
        place = part.to(tl.int64) * prompt_tokens + before + first + tl.arange(0, BN)
        at = (place * HEADS + head) * D
        store_rows(key_parts, at, dk, inside, D, WIDTH)
        store_rows(value_parts, at, dv, inside, D, WIDTH)
    else:
        at = (key_token * HEADS + head) * D
        store_rows(d_key, at, dk * scale, inside, D, WIDTH)
        store_rows(d_value, at, dv, inside, D, WIDTH)


@triton.jit(do_not_specialize=["segments", "prompt_tokens", "parts"])
def _sum_parts_kernel(
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
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d key and d value of the prompts: parts added up from the first to the last."""
    head, program = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    segment, first, before = place_among(offsets, prompt_of, segments, True, program, ROWS)
    begin, length = span_of(offsets, segment)
    row = first + tl.arange(0, ROWS)
    inside = row < length
    at = ((before + tl.minimum(row, length - 1)) * HEADS + head) * D
    dk = tl.zeros((ROWS, WIDTH), tl.float32)
    dv = tl.zeros((ROWS, WIDTH), tl.float32)
    for _ in range(parts):
        dk += load_rows(key_parts, at, D, WIDTH)
        dv += load_rows(value_parts, at, D, WIDTH)
        at += prompt_tokens.to(tl.int64) * (HEADS * D)
    at = ((begin + row) * HEADS + head) * D
    store_rows(d_key, at, dk * scale, inside, D, WIDTH)
    store_rows(d_value, at, dv, inside, D, WIDTH)
