"""cast_copy: what it takes and refuses, and its CUDA kernel, run by the emulator of csrc/cuda/simt.h, against copy_."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from gadcore.kernels.cast_copy import CastCopy, cast_copy, check, copy_table
from gadcore.kernels.cuda import native
from gadcore.kernels.cuda.cast_copy import launch
from tests.support import cuda_emulation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
emulated = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))


def assert_same(got: Tensor, expected: Tensor, bits: bool) -> None:
    """bits: NaNs must be the same ones; else a NaN is a NaN. Signs of zeros count either way."""
    if bits:
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        return
    number = {2: torch.int16, 4: torch.int32}[got.itemsize]
    both_nan = got.isnan() & expected.isnan()
    assert ((got.view(number) == expected.view(number)) | both_nan).all()


def run_copies(pairs: list[tuple[Tensor, Tensor]], blocks: int | None = None) -> None:
    """Copies by the kernel, and compares every element of the targets' storages with what copy_ leaves there."""
    check(pairs)
    storages = {target.untyped_storage().data_ptr(): target for _, target in pairs}
    whole = {key: torch.empty(0, dtype=target.dtype).set_(target.untyped_storage()) for key, target in storages.items()}
    before = {key: storage.clone() for key, storage in whole.items()}
    for source, target in pairs:
        target.copy_(source)
    expected = {key: storage.clone() for key, storage in whole.items()}
    for key, storage in whole.items():
        storage.copy_(before[key])
    launch(cuda_emulation.library(), copy_table(pairs), blocks)
    same_dtype = all(source.dtype == target.dtype for source, target in pairs)
    for key, storage in whole.items():
        assert_same(storage, expected[key], bits=same_dtype)


def canary_bordered(shape: tuple[int, ...], dtype: torch.dtype, before: int) -> Tensor:
    """A contiguous tensor of NaN, `before` elements after the start of a storage that is 77 around it."""
    count = torch.Size(shape).numel()
    storage = torch.full((before + count + 40,), 77, dtype=dtype)
    storage[before : before + count] = torch.nan if dtype.is_floating_point else 3
    return storage[before : before + count].view(shape)


@emulated
@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_casts_of_odd_sizes_and_alignments(source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    pairs = []
    for n, at_source, at_target in itertools.product((1, 3, 4, 8, 31, 4099, 16400), (0, 1, 4, 8), (0, 2, 4, 8)):
        source = torch.randn(n + at_source).to(source_dtype)[at_source:]
        pairs.append((source, canary_bordered((n,), target_dtype, at_target)))
    run_copies(pairs)


def all_values(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type; of float32 those around the ties and the ends of the 16-bit types."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    coarse = torch.cat([all_values(d).float() for d in (torch.bfloat16, torch.float16)]).view(torch.int32)
    half_steps = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, -1], dtype=torch.int32)
    return (coarse[:, None] + half_steps).flatten().view(torch.float32)


@emulated
@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.permutations(DTYPES, 2)))
def test_casts_round_as_torch_does(source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow to infinity, zeros of both signs, and every NaN stays one."""
    source = all_values(source_dtype)
    run_copies([(source, torch.full(source.shape, 77, dtype=target_dtype))])


@emulated
@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.int16, torch.int64, torch.complex128])
def test_copies_within_any_dtype_keep_every_bit(dtype: torch.dtype) -> None:
    pairs = []
    for n, at in itertools.product((1, 5, 33, 1000), (0, 1)):
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, ((n + at) * dtype.itemsize,), dtype=torch.uint8)
        target = torch.zeros((n + at + 7) * dtype.itemsize, dtype=torch.uint8).view(dtype)[at : at + n]
        pairs.append((raw.view(dtype)[at:], target))
    run_copies(pairs)


@emulated
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_slices_of_fused_tensors(source_dtype: torch.dtype) -> None:
    """Bands of columns of one target, of even and of odd widths, which interleave in memory; rows of another."""
    fused, stacked = torch.full((37, 200), torch.nan, dtype=torch.bfloat16), torch.full((60, 33), 77.0)
    bands = [(0, 64), (64, 72), (72, 79), (79, 81), (96, 200)]
    pairs = [(torch.randn(37, end - start).to(source_dtype), fused[:, start:end]) for start, end in bands]
    pairs += [(torch.randn(20, 40).to(source_dtype)[:, 3:36], stacked[start : start + 20]) for start in (0, 40)]
    run_copies(pairs)
    assert fused[:, 81:96].isnan().all() and (stacked[20:40] == 77).all()


@emulated
def test_more_dimensions() -> None:
    """Three and four dimensions that do not merge, transposed ones, single ones, none, and nothing at all."""
    target = torch.full((4, 6, 5, 24), torch.nan, dtype=torch.float16)
    pairs = [
        (torch.randn(3, 4, 2, 16), target[:3, 1:5, ::3, 4:20]),
        (torch.randn(5, 6, 8).transpose(0, 1), target[3, :, :, 16:]),
        (torch.randn(7, 1), torch.full((7, 9), 77.0)[:, 4:5]),
        (torch.randn(1, 13).expand(6, 13), torch.full((6, 13), 77.0)),
        (torch.randn(()), torch.full((), 77.0, dtype=torch.bfloat16)),
        (torch.randn(0, 5), torch.empty(0, 5)),
    ]
    for pair in pairs:
        run_copies([pair])
    run_copies(pairs)
    run_copies([])


@emulated
@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_every_number_of_blocks_does_all_the_work(blocks: int) -> None:
    """Chunks of large and small copies, taken by one block, by some, and by one each; in any order."""
    sizes = [1, 100_000, 7, 8192, 8193, 3, 50_001]
    pairs = [(torch.randn(n), torch.full((n,), torch.nan, dtype=torch.bfloat16)) for n in sizes]
    cuda_emulation.set_seed(blocks)
    try:
        run_copies(pairs, blocks)
    finally:
        cuda_emulation.set_seed(0)


# --- the public functions --------------------------------------------------------------------------------------------


def test_reference() -> None:
    source, fused = torch.randn(4, 6, requires_grad=True), torch.zeros(4, 10, dtype=torch.bfloat16)
    cast_copy([(source, fused[:, 2:8]), (torch.ones(4, 2), fused[:, 8:])])
    expected = torch.cat([torch.zeros(4, 2), source.detach(), torch.ones(4, 2)], 1).bfloat16()
    assert torch.equal(fused, expected) and not fused.requires_grad
    cast_copy([])


def test_a_plan_copies_what_the_sources_hold_when_it_is_called() -> None:
    source, target = torch.nn.Parameter(torch.zeros(5)), torch.ones(5)
    copies = CastCopy([(source, target)], impl="reference")
    assert copies.impl == "reference" and (target == 1).all()
    for value in (3.0, 4.0):
        source.data.fill_(value)
        copies()
        assert (target == value).all()


def test_cuda_by_name_raises_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="the CUDA op cast_copy is not available: "):
        cast_copy([(torch.zeros(2), torch.zeros(2))], impl="cuda")
    assert not torch.equal(*(pair := (torch.zeros(2), torch.ones(2)))) and CastCopy([pair]).impl == "reference"


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match='impl must be "auto", "reference" or "cuda"'):
        cast_copy([], impl="triton")  # type: ignore[arg-type]


F = torch.zeros(8, 8)
REFUSED = {
    "shapes": ([(F, F.clone()), (torch.zeros(2), torch.zeros(3))], r"pair 1: the source is \[2\], the target \[3\]"),
    "devices": ([(F, torch.zeros(8, 8, device="meta"))], "pair 0: all tensors must be on one device, got cpu, meta"),
    "devices of pairs": (
        [(torch.zeros(1), torch.zeros(1)), tuple(torch.zeros(2, 1, device="meta"))],
        "pair 1: all tensors must be on one device",
    ),
    "no cast": ([(torch.zeros(2), torch.zeros(2, dtype=torch.float64))], "no cast from torch.float32 to torch.float64"),
    "no cast of integers": ([(torch.zeros(2, dtype=torch.int32), torch.zeros(2))], "no cast from torch.int32"),
    "source strides": ([(F.t(), torch.zeros(8, 8))], "the last dimension of the source must be contiguous"),
    "target strides": ([(torch.zeros(8, 4), F[:, ::2])], "the last dimension of the target must be contiguous"),
    "same target": (
        [(torch.zeros(8, 8), F), (torch.ones(8, 8), F)],
        "the target of pair 0 overlaps the target of pair 1",
    ),
    "columns in common": (
        [(torch.zeros(8, 4), F[:, :4]), (torch.zeros(8, 5), F[:, 3:])],
        "the target of pair 0 overlaps the target of pair 1",
    ),
    "rows in common": (
        [(torch.zeros(5, 8), F[3:]), (torch.zeros(4, 2), F[:4, 6:])],
        "the target of pair 1 overlaps the target of pair 0",
    ),
    "source and target": ([(F[:, :4], F[:, 2:6])], "the source of pair 0 overlaps the target of pair 0"),
    "another pair's source": (
        [(F[0], torch.zeros(8)), (torch.zeros(8), F[0])],
        "the (source of pair 0|target of pair 1) overlaps the",
    ),
    "expanded target": ([(torch.zeros(3, 8), F[0].expand(3, 8))], "the rows of the target overlap each other"),
    "expanded in front": (
        [(torch.zeros(3, 2, 4), F[:2, :4].expand(3, 2, 4))],
        "the target of pair 0 overlaps the target of pair 0",
    ),
    "windows": ([(torch.zeros(4, 8), F.as_strided((4, 8), (5, 1)))], "the rows of the target overlap each other"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_refusals(case: str, impl: str) -> None:
    """The same pairs are refused whatever computes, and before anything is written."""
    pairs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        cast_copy(pairs, impl)  # type: ignore[arg-type]
    assert (F == 0).all()


def test_overlaps_are_those_of_elements() -> None:
    """Random slices of a storage, of equal and unequal row strides: refused where they share an element, only then."""
    draw = random.Random(0)
    refused = 0
    for _ in range(2000):
        base = torch.arange(400)
        stride = draw.choice([12, 12, 12, 17])
        views = []
        for row_stride in (12, stride):
            columns, rows = draw.randint(1, 10), draw.randint(1, 6)
            views.append(base.as_strided((rows, columns), (row_stride, 1), draw.randint(0, 60)))
        share = bool(set(views[0].flatten().tolist()) & set(views[1].flatten().tolist()))
        refused += share
        pairs = [(torch.zeros_like(view), view) for view in views]
        if share:
            with pytest.raises(ValueError, match="overlaps"):
                check(pairs)
        else:
            check(pairs)
    assert 200 < refused < 1800


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason, once as a warning where it was not asked for by name, and as an error where it was."""
    for function in (native._load, native.why_missing, native._notice):
        function.cache_clear()
    monkeypatch.delenv("GADCORE_NO_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", native.LIBRARY.with_name("nowhere.so"))
    try:
        with pytest.warns(UserWarning, match="nowhere.so was not built: build it with"):
            assert not native.available("cast_copy")
        assert not native.available("cast_copy"), "a second warning would be an error here"
        with pytest.raises(RuntimeError, match="the CUDA op cast_copy is not available: .*nowhere.so was not built"):
            native.require("cast_copy")
    finally:
        for function in (native._load, native.why_missing, native._notice):
            function.cache_clear()
