"""The kernels of linear_logprob: block shapes, shares of the vocabulary, chunks of backward, memory, program order."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gadcore.kernels.triton import _shared, linear_logprob
from tests.support.kernel_grid import F64, FORWARD, GRADIENT, leaves64, logprob64, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.8


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`tiles(BT, BV, BK, descriptors=True, sms=132)`: how the kernels cut their work."""

    def choose(BT: int, BV: int, BK: int, *, descriptors: bool = True, sms: int = 132) -> None:
        configs = [_shared.tile_config(BT, BV, BK, 4, 2)]
        monkeypatch.setattr(linear_logprob._partials_kernel, "configs", configs)
        monkeypatch.setattr(linear_logprob._dlogits_kernel, "configs", configs)
        monkeypatch.setattr(_shared, "has_descriptors", lambda dtype: descriptors and dtype.itemsize == 2)
        monkeypatch.setattr(linear_logprob, "num_sms", lambda device: sms)

    return choose


def inputs(
    T: int, H: int, V: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(T + V)
    hidden, weight = (torch.randn(n, H, generator=generator).to(dtype) for n in (T, V))
    offset = torch.randn(V, generator=generator).to(dtype) if bias else None
    return hidden, weight, offset, torch.randint(V, (T,), generator=generator)


def gradient_of(T: int) -> Tensor:
    return torch.randn(T, generator=torch.Generator().manual_seed(1))


def check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, entropy: bool = True) -> None:
    """Forward and all gradients against float64."""
    grad = gradient_of(len(targets))
    logprob, row_max, log_sum, entropies = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, entropy)
    gradients = linear_logprob.backward(
        grad, hidden, weight, bias, targets, row_max, log_sum, TEMPERATURE, True, True, bias is not None
    )
    leaves = leaves64(hidden, weight, bias)
    truth, truth_entropy = logprob64(*leaves, targets, TEMPERATURE)
    truth_gradients = torch.autograd.grad((truth * grad).sum(), [leaf for leaf in leaves if leaf is not None])
    assert relative_error(logprob, truth.detach(), 1.0) <= FORWARD[hidden.dtype]
    if entropy:
        assert relative_error(entropies, truth_entropy.detach(), 1.0) <= FORWARD[hidden.dtype]
    else:
        assert entropies.shape == (0,)
    for actual, expected in zip(gradients, truth_gradients, strict=False):
        assert actual.dtype == hidden.dtype and actual.shape == expected.shape
        assert relative_error(actual, expected, 0.0) <= GRADIENT[hidden.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("blocks", [(16, 32, 16), (32, 64, 64), (64, 16, 32), (128, 256, 64)], ids=str)
@pytest.mark.parametrize("T, V, bias", [(1, 203, False), (37, 160, False), (70, 250, True)])
def test_block_shapes(
    tiles: Callable[..., None],
    dtype: torch.dtype,
    descriptors: bool,
    blocks: tuple[int, int, int],
    T: int,
    V: int,
    bias: bool,
) -> None:
    tiles(*blocks, descriptors=descriptors)
    check(*inputs(T, 72, V, dtype, bias=bias), entropy=bias)


@pytest.mark.parametrize("config", _shared.TILE_CONFIGS, ids=str)
def test_the_tiles_of_production(tiles: Callable[..., None], config: triton.Config) -> None:
    tiles(*config.kwargs.values())
    check(*inputs(130, 128, 530, torch.bfloat16))


@pytest.mark.parametrize("splits", [1, 2, 4, 11])
def test_shares_of_the_vocabulary(tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """11 tiles: one share of all of them, shares of different sizes, shares of one."""
    tiles(16, 32, 32)
    monkeypatch.setattr(linear_logprob, "forward_grid", lambda *_: (3, splits))
    check(*inputs(37, 40, 333, torch.float32, bias=True))


@pytest.mark.parametrize("kind", ["ignored", "all ignored", "impossible", "extreme", "one column"])
def test_unusual_rows(tiles: Callable[..., None], kind: str) -> None:
    tiles(16, 32, 32, sms=3)
    hidden, weight, bias, targets = inputs(37, 40, 1 if kind == "one column" else 200, torch.float32, bias=True)
    assert bias is not None
    if kind == "ignored":
        targets[::3] = -100
    elif kind == "all ignored":
        targets[:] = -100
        grad = torch.full((37,), torch.nan)
        logprob, row_max, log_sum, entropy = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
        assert not logprob.any() and not entropy.any()
        gradients = linear_logprob.backward(
            grad, hidden, weight, bias, targets, row_max, log_sum, TEMPERATURE, True, True, True
        )
        assert not any(gradient.any() for gradient in gradients)
        return
    elif kind == "impossible":
        # Whole tiles of -inf, and the first one of a share among them.
        bias[:100], bias[150:] = -torch.inf, -torch.inf
        targets = targets % 50 + 100
    elif kind == "extreme":
        # Integers: logits of up to 1e4 that are exact in fp32.
        hidden, weight, bias = hidden.round(), weight.round(), bias.round()
        hidden[:, 0], weight[:, 0] = 128, torch.arange(200.0).flip(0) % 160 - 80
    elif kind == "one column":
        # All gradients are 0: nothing to be relative to.
        logprob, row_max, log_sum, entropy = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
        assert not logprob.any() and not log_sum.any() and not entropy.any()
        return
    check(hidden, weight, bias, targets)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("wrong", [-1, 200, 2**32 + 5, -(2**40)])
def test_a_target_outside_the_vocabulary_is_nan(tiles: Callable[..., None], wrong: int) -> None:
    tiles(16, 32, 32)
    hidden, weight, bias, targets = inputs(5, 64, 200, torch.float32, bias=True)
    before = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
    targets[2] = wrong
    after = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
    assert after[0].isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(after[0][[0, 1, 3, 4]], before[0][[0, 1, 3, 4]])
    linear_logprob.backward(
        gradient_of(5), hidden, weight, bias, targets, after[1], after[2], TEMPERATURE, True, True, True
    )


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_spreads_no_further_than_its_row(tiles: Callable[..., None]) -> None:
    tiles(16, 32, 32)
    hidden, weight, bias, targets = inputs(5, 64, 200, torch.float32)
    hidden[3, 7] = torch.nan
    logprob, _, log_sum, entropy = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
    for result in (logprob, log_sum, entropy):
        assert result.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_backward(tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tiles(16, 64, 64)
    monkeypatch.setattr(linear_logprob, "DLOGITS_BYTES", 1)
    assert linear_logprob.chunk_columns(20, 600, 4) == 256
    check(*inputs(20, 64, 600, dtype, bias=True))


def test_chunks_fill_the_scratch_and_are_alike() -> None:
    assert linear_logprob.chunk_columns(1, 151936, 2) == 152064  # one chunk
    columns = linear_logprob.chunk_columns(12288, 151936, 2)
    assert columns % linear_logprob.COLUMNS == 0
    assert 0.9 * linear_logprob.DLOGITS_BYTES < 12288 * columns * 2 <= linear_logprob.DLOGITS_BYTES
    assert triton.cdiv(151936, columns) * columns - 151936 < 7 * linear_logprob.COLUMNS


def test_only_the_gradients_asked_for(tiles: Callable[..., None]) -> None:
    tiles(16, 64, 64)
    hidden, weight, bias, targets = inputs(20, 64, 300, torch.bfloat16, bias=True)
    _, row_max, log_sum, _ = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, False)
    given = (gradient_of(20), hidden, weight, bias, targets, row_max, log_sum, TEMPERATURE)
    every = linear_logprob.backward(*given, True, True, True)
    for wanted in range(8):
        needs = [bool(wanted >> i & 1) for i in range(3)]
        for need, some, full in zip(needs, linear_logprob.backward(*given, *needs), every, strict=True):
            assert torch.equal(some, full) if need else some.shape == (0,)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("T, H, V, bias", [(1, 64, 33, True), (37, 72, 203, False), (33, 128, 96, True)])
def test_no_access_out_of_bounds_and_no_race(
    tiles: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    descriptors: bool,
    T: int,
    H: int,
    V: int,
    bias: bool,
) -> None:
    tiles(16, 32, 32, descriptors=descriptors, sms=3)
    monkeypatch.setattr(linear_logprob, "COLUMNS", 64)
    monkeypatch.setattr(linear_logprob, "DLOGITS_BYTES", 1)
    check(*inputs(T, H, V, torch.bfloat16, bias=bias))


def test_gaps_of_strided_operands_are_not_read(tiles: Callable[..., None]) -> None:
    """Rows apart, in memory whose gaps hold NaN: read through descriptors, by pointers, and out of a copy."""
    for dtype, width, gap in ((torch.bfloat16, 72, 8), (torch.float32, 64, 64), (torch.bfloat16, 72, 3)):
        tiles(16, 32, 32, descriptors=dtype == torch.bfloat16)
        hidden, weight, bias, targets = inputs(20, width, 100, dtype)
        wide = [torch.full((len(x), width + gap), torch.nan).to(dtype) for x in (hidden, weight)]
        views = [x[:, :width] for x in wide]
        for view, x in zip(views, (hidden, weight), strict=True):
            view.copy_(x)
        assert (_shared.aligned(views[0]) is views[0]) == (gap != 3)
        check(*views, bias, targets)


@pytest.mark.parametrize("seed", [0, 1])
def test_program_order_changes_no_bit(tiles: Callable[..., None], shuffled_programs: Callable, seed: int) -> None:
    tiles(16, 32, 32, sms=5)
    hidden, weight, bias, targets = inputs(70, 64, 333, torch.bfloat16, bias=True)

    def run() -> list[Tensor]:
        forward = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
        given = (gradient_of(70), hidden, weight, bias, targets, forward[1], forward[2], TEMPERATURE)
        return [*forward, *linear_logprob.backward(*given, True, True, True)]

    expected = run()
    with shuffled_programs(seed):
        assert all(map(torch.equal, run(), expected))


def sparse(rows: int, stride: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width] with rows `stride` elements apart in memory that exists only where it is touched."""
    size = ((rows - 1) * stride + width) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).as_strided((rows, width), (stride, 1))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(tiles: Callable[..., None], descriptors: bool) -> None:
    tiles(16, 16, 32, descriptors=descriptors)
    stride = 2**30 + 64
    far = [sparse(4, stride, 64, torch.bfloat16) for _ in range(2)]
    hidden, weight, bias, targets = inputs(4, 64, 4, torch.bfloat16)
    for view, x in zip(far, (hidden, weight), strict=True):
        view.copy_(x)
        assert _shared.aligned(view) is view and 3 * stride > 2**31
    near = linear_logprob.forward(hidden, weight, bias, targets, TEMPERATURE, True)
    results = linear_logprob.forward(*far, bias, targets, TEMPERATURE, True)
    assert all(map(torch.equal, results, near))

    out = sparse(4, stride, 16, torch.bfloat16)
    operands = _shared.operands(*far, 4)
    linear_logprob._dlogits_kernel[(1,)](
        operands.hidden,
        operands.weight,
        torch.zeros(4),
        targets,
        gradient_of(4),
        near[1],
        near[2],
        out,
        4,
        4,
        0,
        operands.stride_hidden,
        operands.stride_weight,
        out.stride(0),
        128,
        _shared.LOG2E.value,
        1.0,
        **operands.constants,
    )
    z = hidden.to(F64) @ weight.to(F64).T
    scale = torch.exp(z - near[1][:, None] - near[2][:, None])
    hit = torch.nn.functional.one_hot(targets, 4)
    expected = gradient_of(4)[:, None] * (hit - scale)
    assert relative_error(out[:, :4], expected, 0.0) < 1e-2


@triton.jit
def _places_kernel(out, T, tiles, group_tokens, BT: tl.constexpr):
    block, tile = _shared.place(T, tiles, group_tokens, BT)
    tl.store(out + 2 * tl.program_id(0), block)
    tl.store(out + 2 * tl.program_id(0) + 1, tile)


@pytest.mark.parametrize(
    "T, tiles, group", [(1, 1, 128), (300, 7, 128), (300, 7, 256), (1000, 3, 384), (1000, 5, 1024)]
)
def test_every_place_is_taken_once_and_shares_are_neighbours(T: int, tiles: int, group: int) -> None:
    blocks = triton.cdiv(T, 64)
    out = torch.empty(blocks * tiles, 2, dtype=torch.int32)
    _places_kernel[(blocks * tiles,)](out, T, tiles, group, BT=64)
    places = [tuple(place) for place in out.tolist()]
    assert sorted(places) == [(block, tile) for block in range(blocks) for tile in range(tiles)]
    side = min(group // 64, blocks)
    assert places[:side] == [(block, 0) for block in range(side)]


def test_groups_of_tokens_fit_half_of_l2() -> None:
    l2 = 50 << 20
    for T, row_bytes in ((4096, 7168), (12288, 10240), (1, 7168), (5000, 16384)):
        tokens = _shared.group_tokens(T, row_bytes, l2)
        assert tokens % 128 == 0 and (tokens - 128) * row_bytes <= l2 // 2
        groups = triton.cdiv(T, tokens)
        assert T - (groups - 1) * tokens > tokens - 128 * groups  # all about alike


@pytest.mark.parametrize("sms", [108, 132, 148])
def test_the_chip_is_filled(sms: int) -> None:
    for V in (128256, 151936):
        for T in (1, 64, 100, 512, 4096, 12288, 50000):
            BT, BV = (64, 128) if T <= 64 else (128, 256)
            blocks, splits = linear_logprob.forward_grid(T, V, sms, BT, BV)
            assert blocks == triton.cdiv(T, BT) and splits <= triton.cdiv(V, BV)
            slots = sms * (2 if BT * BV <= 128 * 128 else 1)
            busiest = triton.cdiv(blocks * splits, slots) * triton.cdiv(triton.cdiv(V, BV), splits)
            assert blocks * triton.cdiv(V, BV) / slots / busiest > 0.8
            assert blocks * splits >= 0.8 * slots


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruning_leaves_tiles_that_fit(monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_shared, "capability", lambda: arch)
    monkeypatch.setattr(_shared, "INTERPRETED", False)
    for T in (1, 64, 65, 4096, 12288):
        operands = _shared.operands(torch.empty(T, 128, dtype=dtype), torch.empty(256, 128, dtype=dtype), T)
        assert operands.constants["DESCRIPTORS"] == (arch >= 90 and dtype != torch.float32)
        left = _shared.prune_tiles(_shared.TILE_CONFIGS, {"hidden": operands.hidden}, **operands.constants)
        assert left
        for config in left:
            BT, BV, BK = config.kwargs.values()
            stages = config.num_stages * (BT + BV) * BK * dtype.itemsize
            assert stages <= {80: 166912, 90: 232448, 100: 232448, 120: 101376}[arch]


def test_a_ragged_batch_does_not_tune_anew() -> None:
    assert len({_shared.token_bucket(T) for T in range(1100, 16384, 13)}) == 1
    assert len({_shared.token_bucket(T) for T in range(1, 200000, 7)}) <= 4


def test_products_take_the_cuda_way_with_fp32_results() -> None:
    """On meta tensors, which take the same way as CUDA ones: the overloads exist and accept what they are given."""
    a, b = torch.empty(8, 16, dtype=torch.bfloat16, device="meta"), torch.empty(16, 4, device="meta").bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        for add in (False, True):
            _shared.mm_into(torch.empty(8, 9, dtype=dtype, device="meta")[:, :4], a, b, alpha=0.5, add=add)
