"""Log-probabilities of given tokens, and their gradients, in Triton: the GPU side of linear_logprob.

    z = hidden @ weight.T + bias                              [T, V], never in memory in forward
    row_max_t  = max_v z_tv
    log_sum_t  = log sum_v exp((z_tv - row_max_t) / temperature)
    logprob_t  = (z_ty - row_max_t) / temperature - log_sum_t
    entropy_t  = log_sum_t - sum_v p_tv (z_tv - row_max_t) / temperature
    d z_tv     = grad_t (1[v = y_t] - p_tv) / temperature

Forward is one kernel over (token blocks x shares of the vocabulary) and a small one that combines the shares in a
fixed order. Backward computes the logits again, a chunk of the vocabulary at a time, and leaves the two products
with d z to cuBLAS. Nothing is added up by atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton._shared import (
    HALF_SM_TILE,
    IGNORED,
    LN2,
    LOG2E,
    add_bias,
    aligned,
    autotune_tiles,
    group_tokens,
    l2_bytes,
    logits_tile,
    mm_into,
    num_sms,
    on_its_device,
    operands,
    place,
    tile_bias,
)

# Scratch for d logits in backward. Each chunk reads and writes the fp32 d_hidden once more.
DLOGITS_BYTES = 512 << 20
COLUMNS = 256  # chunks are multiples of it, so that every chunk starts on a tile and is aligned
# V is not in it: chunks of backward differ by the number of tokens.
_KEY = ["H", "TOKENS", "DESCRIPTORS"]


@functools.lru_cache(maxsize=4096)
def forward_grid(T: int, V: int, num_sms: int, BT: int, BV: int) -> tuple[int, int]:
    """Token blocks and shares of the vocabulary that forward runs for T tokens; their product is its program count.

    The fewest shares whose time, counted in tiles one after the other on the busiest SM, is within 2 % of the best.
    """
    blocks, tiles = triton.cdiv(T, BT), triton.cdiv(V, BV)
    slots = num_sms * (2 if BT * BV <= HALF_SM_TILE else 1)
    most = min(tiles, triton.cdiv(16 * slots, blocks))
    # -(-a // b) rounds up as triton.cdiv does, without the time that this takes in Python.
    steps = [-(-blocks * splits // slots) * -(-tiles // splits) for splits in range(1, most + 1)]
    best = min(steps)
    return blocks, 1 + next(i for i, count in enumerate(steps) if count <= 1.02 * best)


@autotune_tiles(key=[*_KEY, "V", "ENTROPY"])
@triton.jit(do_not_specialize=["T", "field_stride", "group_tokens"])
def _partials_kernel(
    hidden,
    weight,
    bias,
    targets,
    parts,
    field_stride,
    T,
    V,
    stride_hidden,
    stride_weight,
    group_tokens,
    scale,
    H: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TOKENS: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """parts[:, share, t]: maximum, sum of exponentials, target's logit and sum of e log2(e) over a share of V.

    scale: log2(e) / temperature. TOKENS is there for the autotuner's key.
    """
    splits = tl.num_programs(0) // tl.cdiv(T, BT)
    block, split = place(T, splits, group_tokens, BT)
    rows = block * BT + tl.arange(0, BT)
    # 32 bits are enough for those that count, and halve the comparisons with every column.
    y = tl.load(targets + rows, mask=rows < T, other=-1)
    y = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
    row_max = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    picked = tl.zeros((BT,), tl.float32)
    weighted = tl.zeros((BT,), tl.float32)
    tiles = tl.cdiv(V, BV)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        first = tile * BV
        z = logits_tile(
            hidden, weight, block * BT, first, T, V, stride_hidden, stride_weight, H, BT, BV, BK, DESCRIPTORS
        )
        z = add_bias(z, bias, first, V, BV)
        # Most tiles hold no target of this block: a test of BT numbers saves three instructions a logit.
        if tl.sum(((y >= first) & (y < first + BV)).to(tl.int32)) > 0:
            columns = first + tl.arange(0, BV)
            picked += tl.sum(tl.where(columns[None, :] == y[:, None], z, 0.0), 1)
        new_max = tl.maximum(row_max, tl.max(z, 1))
        # A row of -inf so far: any finite reference does, and -inf itself would give NaN.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        # First the difference, then the scale: logits of +-1e4 lose nothing.
        exponent = (z - reference[:, None]) * scale
        shift = (row_max - reference) * scale
        decay = tl.exp2(shift)
        if ENTROPY:
            # Bounded, so that a logit of -inf adds 0 and not 0 * inf.
            exponent = tl.maximum(exponent, -200.0)
            e = tl.exp2(exponent)
            moved = weighted + total * tl.where(row_max == float("-inf"), 0.0, shift)
            weighted = moved * decay + tl.sum(e * exponent, 1)
        else:
            e = tl.exp2(exponent)
        total = total * decay + tl.sum(e, 1)
        row_max = new_max
    out = parts + split.to(tl.int64) * T + rows
    tl.store(out, row_max, mask=rows < T)
    tl.store(out + field_stride, total, mask=rows < T)
    tl.store(out + 2 * field_stride, picked, mask=rows < T)
    if ENTROPY:
        tl.store(out + 3 * field_stride, weighted, mask=rows < T)


@triton.jit(do_not_specialize=["T", "field_stride", "splits"])
def _combine_kernel(
    parts,
    field_stride,
    targets,
    logprob,
    row_max,
    log_sum,
    entropy,
    T,
    V,
    splits,
    scale,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < T
    at = parts + rows
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    for _ in range(splits):
        m = tl.maximum(m, tl.load(at, mask=inside, other=0.0))
        at += T
    at = parts + rows
    total = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        m_part = tl.load(at, mask=inside, other=0.0)
        sum_part = tl.load(at + field_stride, mask=inside, other=1.0)
        shift = (m_part - m) * scale
        decay = tl.exp2(shift)
        total += sum_part * decay
        picked += tl.load(at + 2 * field_stride, mask=inside, other=0.0)
        if ENTROPY:
            moved = tl.load(at + 3 * field_stride, mask=inside, other=0.0)
            weighted += decay * (moved + sum_part * tl.where(m_part == float("-inf"), 0.0, shift))
        at += T
    log_total = tl.log(total)
    y = tl.load(targets + rows, mask=inside, other=0)
    value = tl.where((y >= 0) & (y < V), (picked - m) * inverse_temperature - log_total, float("nan"))
    tl.store(logprob + rows, tl.where(y == IGNORED, 0.0, value), mask=inside)
    tl.store(row_max + rows, m, mask=inside)
    tl.store(log_sum + rows, log_total, mask=inside)
    if ENTROPY:
        spread = log_total - weighted / total * LN2
        tl.store(entropy + rows, tl.where(y == IGNORED, 0.0, spread), mask=inside)


@autotune_tiles(key=_KEY)
@triton.jit(do_not_specialize=["T", "first_column", "group_tokens"])
def _dlogits_kernel(
    hidden,
    weight,
    bias,
    targets,
    grad,
    row_max,
    log_sum,
    out,
    T,
    V,
    first_column,
    stride_hidden,
    stride_weight,
    stride_out,
    group_tokens,
    scale,
    inverse_temperature,
    H: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TOKENS: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """out: d logits of one chunk: weight and bias are its V rows, `first_column` is where it starts."""
    block, tile = place(T, tl.cdiv(V, BV), group_tokens, BT)
    first = tile * BV
    z = logits_tile(hidden, weight, block * BT, first, T, V, stride_hidden, stride_weight, H, BT, BV, BK, DESCRIPTORS)
    z = add_bias(z, bias, first, V, BV)
    rows = block * BT + tl.arange(0, BT)
    columns = first + tl.arange(0, BV)
    inside = rows < T
    y = tl.load(targets + rows, mask=inside, other=IGNORED)
    m = tl.load(row_max + rows, mask=inside, other=0.0)
    # log2(e) log_sum, so that one exp2 gives the probability.
    log2_sum = tl.load(log_sum + rows, mask=inside, other=0.0) * LOG2E
    slope = tl.load(grad + rows, mask=inside, other=0.0) * inverse_temperature
    slope = tl.where(y == IGNORED, 0.0, slope)
    p = tl.exp2((z - m[:, None]) * scale - log2_sum[:, None])
    y = y - first_column
    y = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
    hit = columns[None, :] == y[:, None]
    dz = slope[:, None] * (tl.where(hit, 1.0, 0.0) - p)
    # Rows of `out` hold whole tiles: what lies past the end is written too, as 0, for the sake of wide stores.
    at = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=inside[:, None])


@on_its_device
def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [T], row_max [T], log_sum [T], entropy [T] or [0]), all fp32.

    hidden: [T, H]; weight: [V, H]; bias: [V] or None; all fp32, bf16 or fp16. Any strides, but where `aligned` cannot
    read them (rows not contiguous, or not on 16 bytes) hidden or weight is copied. targets: [T] int64: -100 gives
    logprob and entropy 0, others outside [0, V) a logprob of NaN. Logits may be -inf, as long as each row has a
    finite one.
    """
    hidden, weight = aligned(hidden), aligned(weight)
    (T, H), V, device = hidden.shape, weight.shape[0], hidden.device
    targets, bias = targets.contiguous(), tile_bias(bias, weight)
    logprob, row_max, log_sum = (torch.empty(T, dtype=torch.float32, device=device) for _ in range(3))
    entropies = torch.empty(T if entropy else 0, dtype=torch.float32, device=device)
    sms = num_sms(device)

    def splits(config: dict[str, int]) -> int:
        return forward_grid(T, V, sms, config["BT"], config["BV"])[1]

    # The autotuner may choose any of its configs.
    most = max(splits(config.kwargs) for config in _partials_kernel.configs)
    parts = torch.empty(4 if entropy else 3, most, T, dtype=torch.float32, device=device)
    scale = LOG2E.value / temperature
    tiles = operands(hidden, weight, T)
    _partials_kernel[lambda config: (triton.cdiv(T, config["BT"]) * splits(config),)](
        tiles.hidden,
        tiles.weight,
        bias,
        targets,
        parts,
        parts.stride(0),
        T,
        V,
        tiles.stride_hidden,
        tiles.stride_weight,
        group_tokens(T, H * hidden.element_size(), l2_bytes(device)),
        scale,
        ENTROPY=entropy,
        **tiles.constants,
    )
    _combine_kernel[(triton.cdiv(T, 128),)](
        parts,
        parts.stride(0),
        targets,
        logprob,
        row_max,
        log_sum,
        entropies,
        T,
        V,
        splits(_partials_kernel.best_config.kwargs),
        scale,
        1.0 / temperature,
        ENTROPY=entropy,
        BLOCK=128,
    )
    return logprob, row_max, log_sum, entropies


def chunk_columns(T: int, V: int, itemsize: int) -> int:
    """Columns of a chunk of backward: as many as DLOGITS_BYTES hold, all chunks about alike."""
    most = max(DLOGITS_BYTES // (T * itemsize) // COLUMNS, 1) * COLUMNS
    chunks = triton.cdiv(V, most)
    return triton.cdiv(triton.cdiv(V, chunks), COLUMNS) * COLUMNS


@on_its_device
def backward(
    grad_logprob: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden [T, H], d weight [V, H], d bias [V]) in the dtypes of what they belong to; [0] where not needed.

    grad_logprob: [T] fp32; row_max, log_sum: forward's. d logits is rounded to the dtype of `hidden`, a chunk of the
    vocabulary at a time (DLOGITS_BYTES); everything is added up in fp32 (see `mm_into`). Three products, the two of
    the gradients by cuBLAS. In fp16 small probabilities vanish where grad_logprob is far below 1: scale the loss.
    """
    targets, grad_logprob = targets.contiguous(), grad_logprob.contiguous()
    (T, H), V, device, dtype = hidden.shape, weight.shape[0], hidden.device, hidden.dtype
    d_weight = torch.empty((V, H) if need_weight else (0,), dtype=weight.dtype, device=device)
    d_bias = torch.empty(V if need_bias else 0, dtype=weight.dtype if bias is None else bias.dtype, device=device)
    summed = torch.empty((T, H) if need_hidden else (0,), dtype=torch.float32, device=device)
    columns = chunk_columns(T, V, hidden.element_size())
    scratch = torch.empty(T, columns, dtype=dtype, device=device)
    tokens = group_tokens(T, H * hidden.element_size(), l2_bytes(device))
    offset = tile_bias(bias, weight)
    rows, table = aligned(hidden), aligned(weight)
    for first in range(0, V, columns) if need_hidden or need_weight or need_bias else ():
        chunk = slice(first, min(first + columns, V))
        count = chunk.stop - first
        dz = scratch[:, :count]
        tiles = operands(rows, table[chunk], T)

        def grid(config: dict[str, int], count: int = count) -> tuple[int]:
            return (triton.cdiv(T, config["BT"]) * triton.cdiv(count, config["BV"]),)

        _dlogits_kernel[grid](
            tiles.hidden,
            tiles.weight,
            None if offset is None else offset[chunk],
            targets,
            grad_logprob,
            row_max,
            log_sum,
            scratch,
            T,
            count,
            first,
            tiles.stride_hidden,
            tiles.stride_weight,
            scratch.stride(0),
            tokens,
            LOG2E.value / temperature,
            1.0 / temperature,
            **tiles.constants,
        )
        if need_weight:
            mm_into(d_weight[chunk], dz.t(), hidden)
        if need_hidden:
            mm_into(summed, dz, weight[chunk], add=first > 0)
        if need_bias:
            d_bias[chunk] = dz.sum(0, dtype=torch.float32)
    return summed.to(dtype), d_weight, d_bias
