"""The kernels of prefix_attention: ragged groups, tiles, windows, strides, bounds, races, program order, launches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.prefix_attention import prefix_attention
from gadcore.kernels.triton import _prefix_tiles, _prefix_walk
from gadcore.kernels.triton import prefix_attention as kernels
from tests.support.kernel_grid import F64, relative_error
from tests.support.prefix_kernels import BF16, DTYPES, KERNELS, RAGGED, check, inputs, run, truth

TILES = (_prefix_tiles.FORWARD, _prefix_tiles.D_QUERY, _prefix_tiles.D_KEY_VALUE)
Shuffled = Callable[[int], AbstractContextManager[None]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, BM, BN", [((2, 2), 16, 16), ((3, 1), 32, 16), ((4, 1), 16, 64)], ids=str)
def test_ragged_groups(
    tiles: Callable[[int, int], None], heads: tuple[int, int], BM: int, BN: int, dtype: torch.dtype
) -> None:
    tiles(BM, BN)
    check(inputs(RAGGED, heads, 64, dtype), RAGGED)


@pytest.mark.parametrize("prompts, responses", [([1], [[]]), ([1] * 3, [[3], [], [1, 2]])], ids=str)
def test_the_smallest_groups(tiles: Callable[[int, int], None], prompts: list[int], responses: list[list[int]]) -> None:
    tiles(16, 16)
    layout = PrefixLayout.of(prompts, responses)
    check(inputs(layout, (2, 1), 64, torch.float32), layout)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 96, 128])
def test_head_sizes_stay_in_bounds_without_a_race(
    tiles: Callable[[int, int], None], D: int, dtype: torch.dtype
) -> None:
    tiles(32, 16)
    layout = PrefixLayout.of([1, 11], [[5], [9]])
    check(inputs(layout, (3, 1), D, dtype), layout, scale=D**-0.5)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("window, heads", [(1, 1), (5, 3), (16, 1), (20, 2), (51, 1)])
def test_windows(tiles: Callable[[int, int], None], heads: int, window: int) -> None:
    """From the token itself alone to all but the first of the longest sequence, over prompts, seams and tiles."""
    tiles(16, 16)
    check(inputs(RAGGED, (heads, 1), 64, torch.float32), RAGGED, window=window)


def test_tiles_of_production(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PrefixLayout.of([140, 3], [[70, 131], [1]])
    tensors = inputs(layout, (2, 1), 64, BF16)
    every = [
        list(dict.fromkeys(c for widths in tiles.by_arch.values() for configs in widths.values() for c in configs))
        for tiles in TILES
    ]
    for i in range(max(map(len, every))):
        for name, configs in zip(KERNELS, every, strict=True):
            monkeypatch.setattr(getattr(kernels, name), "configs", [configs[i % len(configs)]])
        check(tensors, layout)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_target_has_tiles(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    monkeypatch.setattr(_prefix_tiles, "capability", lambda: arch)
    forward, d_query, d_key_value = TILES
    for width in (64, 128):
        for tiles in TILES:
            (single,) = tiles.fitting(width, 4)
            found = tiles.fitting(width, 2)
            assert found and all(config in tiles.every() for config in (*found, single))
        # Out of registers a product of 128 rows in the backward pass spills, and 128 keys do on all but sm_90.
        rows, keys = (
            {config.kwargs[block] for config in tiles.fitting(width, 2)}
            for tiles, block in ((d_query, "BM"), (d_key_value, "BN"))
        )
        assert (128 in rows) == (arch in (90, 100)) and (keys == {128}) == (arch == 90)


def test_program_order_changes_no_bit(tiles: Callable[[int, int], None], shuffled_programs: Shuffled) -> None:
    tiles(16, 16)
    tensors = inputs(RAGGED, (2, 1), 64, BF16)
    expected = run(tensors, RAGGED, 0.125, 0)
    with shuffled_programs(0):
        assert all(map(torch.equal, run(tensors, RAGGED, 0.125, 0), expected))


def test_large_logits(tiles: Callable[[int, int], None]) -> None:
    """Of thousands, so that all but a few probabilities are 0; and none overflows behind the mask."""
    tiles(16, 16)
    q, k, v, grad = inputs(RAGGED, (2, 1), 64, torch.float32)
    out, lse, *gradients = run((q.round() * 40, k.round() * 40, v, grad), RAGGED, 0.125, 0)
    true_out, true_lse = truth(*(x.to(F64) for x in (q.round() * 40, k.round() * 40, v)), RAGGED, 0.125, 0)
    assert true_lse.max() > 2000
    assert relative_error(out, true_out, 1.0) <= 1e-5 and relative_error(lse, true_lse, 1.0) <= 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---- strides ----------------------------------------------------------------------------------------------------


def test_views_of_one_projection_are_read_in_place(tiles: Callable[[int, int], None]) -> None:
    tiles(16, 16)
    (Hq, Hk), D = (2, 1), 64
    dense = inputs(RAGGED, (Hq, Hk), D, BF16)
    # 16 columns that belong to nobody hold NaN.
    fused = torch.full((RAGGED.tokens, (Hq + 2 * Hk) * D + 16), math.nan).to(BF16)
    views = [x.unflatten(1, (-1, D)) for x in fused[:, :-16].split([Hq * D, Hk * D, Hk * D], 1)]
    for view, x in zip(views, dense, strict=False):
        view.copy_(x)
        assert kernels._readable(view) is view
    results = run((*views, dense[3]), RAGGED, 0.125, 0)
    assert all(map(torch.equal, results, run(dense, RAGGED, 0.125, 0)))
    assert all(x.is_contiguous() for x in results)


@pytest.mark.parametrize("kind", ["transposed", "unaligned", "every other column"])
def test_strides_that_are_not_readable(tiles: Callable[[int, int], None], kind: str) -> None:
    tiles(16, 16)
    dense = inputs(RAGGED, (2, 1), 64, BF16)

    def strided(x: Tensor) -> Tensor:
        T, heads, D = x.shape
        if kind == "transposed":
            out = x.new_full((D, heads, T), math.nan).permute(2, 1, 0)
        elif kind == "unaligned":
            out = x.new_full((T * heads * D + 1,), math.nan)[1:].view(T, heads, D)
        else:
            out = x.new_full((T, heads, 2 * D), math.nan)[..., ::2]
        return out.copy_(x)

    odd = [strided(x) for x in dense]
    assert all(kernels._readable(x) is not x for x in odd)
    assert all(map(torch.equal, run(odd, RAGGED, 0.125, 0), run(dense, RAGGED, 0.125, 0)))


def test_gradient_of_a_sum(tiles: Callable[[int, int], None]) -> None:
    """One number in memory, expanded; through the op and autograd."""
    tiles(16, 16)
    leaves = [x.requires_grad_() for x in inputs(RAGGED, (2, 1), 64, torch.float32)[:3]]
    gradients = []
    for impl in ("triton", "reference"):
        out = prefix_attention(*leaves, RAGGED, window=20, impl=impl)
        gradients.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def sparse(rows: int, stride: int, width: int) -> Tensor:
    """[rows, 1, width] of bfloat16, rows `stride` elements apart in memory that exists only where it is touched."""
    size = ((rows - 1) * stride + width) * 2
    return torch.frombuffer(mmap.mmap(-1, size), dtype=BF16).as_strided((rows, 1, width), (stride, width, 1))


@pytest.mark.usefixtures("guarded")
def test_offsets_beyond_32_bits(tiles: Callable[[int, int], None]) -> None:
    tiles(16, 16)
    layout = PrefixLayout.of([2], [[1, 1]])
    near = inputs(layout, (1, 1), 64, BF16)
    stride = 2**30 + 64
    far = [sparse(4, stride, 64) for _ in near]
    for view, x in zip(far, near, strict=True):
        view.copy_(x)
        assert kernels._readable(view) is view and 3 * stride > 2**31
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, run(far, layout, 0.125, 0), run(near, layout, 0.125, 0)))


# ---- who sees whom, and which program does what -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("window", [0, 30])
def test_nothing_of_another_response_or_group_is_touched(tiles: Callable[[int, int], None], window: int) -> None:
    """NaN in one response's keys and values stays in that response, in forward and in every gradient but its own."""
    tiles(16, 16)
    tensors = inputs(RAGGED, (2, 1), 64, torch.float32)
    clean = run(tensors, RAGGED, 0.125, window)
    begin, end = RAGGED.offsets[4:6].tolist()  # the second response of the second group
    for x in tensors[1:3]:
        x[begin:end] = math.nan
    spoilt = run(tensors, RAGGED, 0.125, window)
    prompt = slice(*RAGGED.offsets[2:4].tolist())
    others = torch.ones(RAGGED.tokens, dtype=torch.bool)
    others[begin:end] = False
    for i, (now, before) in enumerate(zip(spoilt, clean, strict=True)):
        kept = others.clone()
        if i >= 3:  # gradients of keys and values: those of its prompt are sums over this response too
            kept[prompt] = False
        assert torch.equal(now[kept], before[kept])
        assert now[begin:end].isnan().any()


@triton.jit
def _places_kernel(offsets, prompt_of, out, segments, HEADS: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr):
    head, segment, first = _prefix_walk.place(offsets, segments, HEADS, PER_TOKEN, ROWS)
    at = out + 4 * tl.program_id(0)
    tl.store(at, head)
    tl.store(at + 1, segment)
    tl.store(at + 2, first)
    tl.store(at + 3, _prefix_walk.members_of(prompt_of, segments, segment))


def test_every_tile_of_every_segment_has_one_program() -> None:
    """270 segments: offsets are looked at in two parts."""
    heads, per_token, rows = 2, 3, 16
    lengths = torch.randint(1, 9, (27, 10), generator=torch.Generator().manual_seed(1)).tolist()
    layout = PrefixLayout.of([group[0] for group in lengths], [group[1:] for group in lengths])
    K = len(layout.prompt_of)
    (programs,) = kernels._grid(layout.tokens, K, per_token, "rows", heads)({"rows": rows})
    found = torch.empty(programs, 4, dtype=torch.int32)
    cut = {"HEADS": heads, "PER_TOKEN": per_token, "ROWS": rows}
    _places_kernel[(programs,)](layout.offsets, layout.prompt_of, found, K, **cut)
    count = layout.offsets.diff() * per_token
    expected = [(k, first, h) for k in range(K) for first in range(0, int(count[k]), rows) for h in range(heads)]
    work = [(k, first, h) for h, k, first, _ in found.tolist() if first < count[k]]
    assert work == expected and (found[:, 2] >= 0).all()
    assert found[:, 3].tolist() == [10 if k % 10 == 0 else 1 for k in found[:, 1].tolist()]
    assert programs - len(work) <= heads * K


def test_what_the_kernels_do_not_compute_is_refused() -> None:
    layout = PrefixLayout.of([2], [[1]])
    with pytest.raises(ValueError, match=r"head size of \(64, 96, 128\), got 80"):
        run(inputs(layout, (1, 1), 80, BF16), layout, 0.125, 0)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive scale"):
            run(inputs(layout, (1, 1), 64, BF16), layout, scale, 0)
