"""How a program of prefix_attention.py finds its tile, the keys that its rows see, and where they lie."""

from __future__ import annotations

import triton
import triton.language as tl

# Offsets that a program looks at together.
SCAN = tl.constexpr(256)


@triton.jit
def place(offsets, segments, HEADS: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr):
    """(key head, segment, first row in it) of this program, for tiles of ROWS rows of which a token has PER_TOKEN.

    Segment k owns the places from offsets[k] PER_TOKEN // ROWS + k on. The next one's first is at least as many further
    as k has tiles, since floor(b) + 1 - floor(a) >= ceil(b - a). Heads run side by side: so the long programs of a
    prompt's keys start before the short ones of its responses'.
    """
    head, program = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    count = 0
    for first in range(0, segments, SCAN):
        k = first + tl.arange(0, SCAN)
        start = tl.load(offsets + k, mask=k < segments, other=0) * PER_TOKEN // ROWS + k
        count += tl.sum(((start <= program) & (k < segments)).to(tl.int32), 0)
    segment = count - 1
    start = tl.load(offsets + segment) * PER_TOKEN // ROWS + segment
    return head, segment, ((program - start) * ROWS).to(tl.int32)


@triton.jit
def place_among(offsets, prompt_of, segments, prompts, place, ROWS: tl.constexpr):
    """(segment, first token in it, tokens of those before it) of a place, for tiles of ROWS tokens, among the prompts
    alone, or where not `prompts` among the responses alone.

    As in `place`, with the tokens and the number of those before in the places of offset and index.
    """
    tokens = tl.zeros((), tl.int64)
    rank = tl.zeros((), tl.int32)
    segment, start, before = -1, tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for first in range(0, segments, SCAN):
        k = first + tl.arange(0, SCAN)
        inside = k < segments
        counts = inside & ((tl.load(prompt_of + k, mask=inside, other=0) == k) == prompts)
        lengths = tl.load(offsets + k + 1, mask=inside, other=0) - tl.load(offsets + k, mask=inside, other=0)
        lengths = tl.where(counts, lengths, 0)
        befores = tokens + tl.cumsum(lengths, 0) - lengths
        starts = befores // ROWS + rank + tl.cumsum(counts.to(tl.int32), 0) - 1
        # All three grow from one to the next: the last one that starts no later is the largest.
        found = counts & (starts <= place)
        segment = tl.maximum(segment, tl.max(tl.where(found, k, -1), 0))
        start = tl.maximum(start, tl.max(tl.where(found, starts, 0), 0))
        before = tl.maximum(before, tl.max(tl.where(found, befores, 0), 0))
        tokens += tl.sum(lengths, 0)
        rank += tl.sum(counts.to(tl.int32), 0)
    return segment, ((place - start) * ROWS).to(tl.int32), before


@triton.jit
def span_of(offsets, segment):
    """(first token as int64, number of tokens as int32) of a segment."""
    begin = tl.load(offsets + segment)
    return begin, (tl.load(offsets + segment + 1) - begin).to(tl.int32)


@triton.jit
def prefix_of(offsets, prompt_of, segment):
    """(the prompt's first token, its number of tokens) of a segment's prompt; the number is 0 for a prompt itself."""
    prompt = tl.load(prompt_of + segment)
    begin, length = span_of(offsets, prompt)
    return begin, tl.where(prompt == segment, 0, length)


@triton.jit
def row_start(stride, token, head):
    """Where a token's row of a head starts, in elements. stride: (of a token, of a head); token: int64."""
    return token * stride[0] + head.to(tl.int64) * stride[1]


@triton.jit
def load_rows(base, at, D: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of the rows that start at base + at; 0 from column D on."""
    columns = tl.arange(0, WIDTH)
    to = base + at[:, None] + columns[None, :]
    return tl.load(to) if D == WIDTH else tl.load(to, mask=columns[None, :] < D, other=0.0)


@triton.jit
def store_rows(base, at, x, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    to = base + at[:, None] + columns[None, :]
    mask = inside[:, None] if D == WIDTH else inside[:, None] & (columns[None, :] < D)
    tl.store(to, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def key_tokens(n, end, begin, prompt_begin, prefix, BN: tl.constexpr):
    """(positions n .. n + BN - 1, the tokens whose keys stand there); past the end the last token once more."""
    position = n + tl.arange(0, BN)
    at = tl.minimum(position, end - 1)
    return position, tl.where(at < prefix, prompt_begin, begin - prefix) + at


@triton.jit
def walk_bounds(lowest, window, WINDOWED: tl.constexpr, BN: tl.constexpr):
    """(first, bound): rows from position `lowest` on see nothing before `first`, and all of first .. bound - 1."""
    if WINDOWED:
        first = tl.maximum(lowest - window + 1, 0) // BN * BN
        bound = first
    else:
        first = 0
        bound = (lowest + 1) // BN * BN
    return first, bound


@triton.jit
def sees_keys(rows, keys, window, WINDOWED: tl.constexpr):
    """Whether the rows at some positions see the keys at others."""
    sees = keys <= rows
    if WINDOWED:
        sees = sees & (keys > rows - window)
    return sees


@triton.jit
def members_of(prompt_of, segments, segment):
    """How many segments see the keys of one: itself, and where it is a prompt its responses, which follow it."""
    count = 0
    for first in range(0, segments, SCAN):
        k = first + tl.arange(0, SCAN)
        count += tl.sum((tl.load(prompt_of + k, mask=k < segments, other=-1) == segment).to(tl.int32), 0)
    return tl.maximum(count, 1)
