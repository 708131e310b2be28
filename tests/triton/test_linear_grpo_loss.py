"""The kernels of linear_grpo_loss and grpo_ratio_loss: chunks, d logits in place, memory, program order."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from bench.offline.interpreter import Observer, observe
from gadcore.kernels.triton import _shared, grpo_ratio_loss, linear_grpo_loss
from tests.support.kernel_grid import F64, FORWARD, GRADIENT, leaves64, logprob64, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSS = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.3}
TEMPERATURE, DENOMINATOR = 0.8, 1000.0


class Case:
    """Inputs of linear_grpo_loss, and what it must give in float64."""

    def __init__(
        self,
        T: int,
        H: int,
        V: int,
        dtype: torch.dtype,
        *,
        bias: bool = True,
        old: bool = True,
        ref: bool = True,
        ignore: int = 4,
        cap: float | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(T + V)
        self.hidden, self.weight = (torch.randn(n, H, generator=generator).to(dtype) for n in (T, V))
        self.bias = torch.randn(V, generator=generator).to(dtype) if bias else None
        self.targets = torch.randint(V, (T,), generator=generator)
        if ignore:
            self.targets[ignore - 1 :: ignore] = -100
        self.advantages = torch.randn(T, generator=generator)
        leaves = leaves64(self.hidden, self.weight, self.bias)
        logprob, entropy = logprob64(*leaves, self.targets, TEMPERATURE)
        nearby = [(logprob.detach() + 0.4 * torch.randn(T, generator=generator)).float() for _ in range(2)]
        self.old, self.ref = (x if wanted else None for x, wanted in zip(nearby, (old, ref), strict=True))

        before = logprob.detach() if self.old is None else self.old.to(F64)
        ratio = torch.exp(logprob - before)
        self.importance: dict[str, Any] = {}
        advantages = self.advantages.to(F64)
        if cap is not None:
            sampler = (before + 0.5 * torch.randn(T, generator=generator)).float()
            self.importance = {"sampler_logprob": sampler, "importance_cap": cap}
            advantages = advantages * (before - sampler.to(F64)).exp().clamp(max=cap)
        whole, bounded = ratio * advantages, ratio.clamp(0.8, 1.28) * advantages
        log_ratio = torch.zeros_like(logprob) if self.ref is None else self.ref.to(F64) - logprob
        k3 = log_ratio.exp() - log_ratio - 1
        loss = -torch.minimum(whole, bounded) + LOSS["kl_coef"] * k3
        kept = self.targets != -100
        rows = torch.stack([loss, logprob, k3, ratio, (bounded < whole).to(F64), entropy])
        self.stats = torch.where(kept, rows, 0.0).detach()
        self.gradients = torch.autograd.grad(
            loss[kept].sum() / DENOMINATOR, [leaf for leaf in leaves if leaf is not None]
        )

    def run(self, *, entropy: bool = True, needs: tuple[bool, bool, bool] | None = None) -> tuple[Tensor, ...]:
        needs = needs or (True, True, self.bias is not None)
        given = (self.hidden, self.weight, self.bias, self.targets, self.advantages, self.ref, self.old)
        constants = (TEMPERATURE, *LOSS.values(), DENOMINATOR)
        return linear_grpo_loss.forward(*given, *constants, entropy, *needs, **self.importance)

    def check(self) -> None:
        stats, *gradients = self.run()
        dtype = self.hidden.dtype
        for row, truth in zip(stats, self.stats, strict=True):
            assert relative_error(row, truth, 1.0) <= FORWARD[dtype]
        for actual, truth in zip(gradients, self.gradients, strict=False):
            assert actual.dtype == dtype
            assert relative_error(actual, truth, 0.0) <= GRADIENT[dtype]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """`chunks(tokens, V, block)`: tokens of a chunk for a vocabulary of V, and columns that a row takes at a time."""

    def choose(tokens: int, V: int, block: int = 4096) -> None:
        monkeypatch.setattr(linear_grpo_loss, "LOGITS_BYTES", tokens * triton.cdiv(V, 64) * 64 * 4)
        monkeypatch.setattr(linear_grpo_loss, "BLOCK", block)

    return choose


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, V, tokens, block", [(1, 5, 1, 4096), (13, 333, 13, 128), (13, 320, 5, 64), (9, 257, 1, 512)]
)
def test_chunks_and_blocks(
    chunks: Callable[..., None], dtype: torch.dtype, T: int, V: int, tokens: int, block: int
) -> None:
    chunks(tokens, V, block)
    Case(T, 40, V, dtype, bias=V != 320).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("old, ref", [(True, False), (False, True), (False, False)])
def test_without_old_or_reference(chunks: Callable[..., None], dtype: torch.dtype, old: bool, ref: bool) -> None:
    chunks(4, 100)
    Case(9, 24, 100, dtype, old=old, ref=ref).check()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("cap", [1.0, 1.4])
def test_importance_weights(chunks: Callable[..., None], dtype: torch.dtype, old: bool, cap: float) -> None:
    chunks(4, 100, 64)
    Case(13, 24, 100, dtype, old=old, cap=cap).check()


def test_a_sampler_of_nan_shows() -> None:
    case = Case(5, 24, 100, torch.float32, ignore=0, cap=2.0)
    case.importance["sampler_logprob"][2] = torch.nan
    assert case.run()[0][0].isnan().tolist() == [False, False, True, False, False]


def test_chunks_are_alike_and_fit(chunks: Callable[..., None]) -> None:
    chunks(5, 320)
    assert linear_grpo_loss.chunk_tokens(13, 1280) == 5 and linear_grpo_loss.chunk_tokens(6, 1280) == 3
    assert linear_grpo_loss.chunk_tokens(7, 10**9) == 1


def test_only_what_is_asked_for(chunks: Callable[..., None]) -> None:
    chunks(4, 200, 64)
    case = Case(9, 24, 200, torch.bfloat16)
    stats, *every = case.run()
    for wanted in range(8):
        needs = (bool(wanted & 1), bool(wanted & 2), bool(wanted & 4))
        some_stats, *some = case.run(needs=needs)
        assert torch.equal(some_stats, stats)
        for need, gradient, full in zip(needs, some, every, strict=True):
            assert torch.equal(gradient, full) if need else gradient.shape == (0,)
    without, *_ = case.run(entropy=False)
    assert torch.equal(without[:5], stats[:5]) and not without[5].any()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V, block", [(1, 1), (63, 16), (64, 64), (65, 32), (130, 64)])
def test_no_access_out_of_bounds_and_no_race(
    chunks: Callable[..., None], dtype: torch.dtype, V: int, block: int
) -> None:
    chunks(3, V, block)
    case = Case(7, 24, V, dtype, bias=V % 2 == 1)
    if V == 1:
        stats, *gradients = case.run()  # no gradient to be relative to
        assert not stats[1].any() and not any(gradient.any() for gradient in gradients)
    else:
        case.check()


class _Bytes(Observer):
    """The bytes that each program stores, and whether it loads any of them afterwards."""

    def __init__(self) -> None:
        self.stored: set[int] = set()
        self.overtaken = 0
        self.stores_of_two_bytes = 0

    def program(self, index: int) -> None:
        self.stored = set()

    def access(self, kind: str, addresses: np.ndarray, itemsize: int) -> None:
        touched = {int(a) + i for a in addresses for i in range(itemsize)}
        if kind == "load":
            self.overtaken += len(touched & self.stored)
        else:
            self.stored |= touched
            self.stores_of_two_bytes += itemsize == 2


@pytest.mark.parametrize("V, block", [(64, 16), (63, 16), (100, 32), (128, 128), (190, 64)])
def test_d_logits_overwrite_no_logit_that_is_still_to_be_read(chunks: Callable[..., None], V: int, block: int) -> None:
    chunks(3, V, block)
    case = Case(3, 16, V, torch.bfloat16, bias=False)
    seen = _Bytes()
    with observe(seen):
        case.run()
    assert seen.overtaken == 0 and seen.stores_of_two_bytes == 3 * triton.cdiv(V, block)


@pytest.mark.parametrize("seed", [0, 1])
def test_program_order_changes_no_bit(chunks: Callable[..., None], shuffled_programs: Callable, seed: int) -> None:
    chunks(8, 200, 64)
    case = Case(13, 24, 200, torch.bfloat16)
    expected = case.run()
    with shuffled_programs(seed):
        assert all(map(torch.equal, case.run(), expected))


def test_ignored_rows_are_zero_whatever_else_they_hold(chunks: Callable[..., None]) -> None:
    chunks(4, 100, 64)
    case = Case(9, 24, 100, torch.float32)
    expected = case.run()
    ignored = case.targets == -100
    for row in (case.advantages, case.ref, case.old):
        assert row is not None
        row[ignored] = torch.nan
    assert all(map(torch.equal, case.run(), expected))
    case.targets[:] = -100
    assert not any(result.any() for result in case.run())


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("wrong", [-1, 100, 2**32 + 5])
def test_a_target_outside_the_vocabulary_is_nan(chunks: Callable[..., None], wrong: int) -> None:
    chunks(4, 100, 64)
    case = Case(5, 24, 100, torch.float32, ignore=0)
    expected, *_ = case.run()
    case.targets[2] = wrong
    stats, *_ = case.run()
    others = [0, 1, 3, 4]
    assert torch.equal(stats[:, others], expected[:, others])
    assert stats[[0, 1, 2, 3], 2].isnan().all()


def test_impossible_and_extreme_logits(chunks: Callable[..., None]) -> None:
    chunks(4, 200, 64)
    case = Case(5, 24, 200, torch.float32, ignore=0)
    assert case.bias is not None
    case.bias[:70], case.bias[150:] = -torch.inf, -torch.inf
    case.targets = case.targets % 80 + 70
    case.hidden[:, 0], case.weight[:, 0] = 100.0, torch.arange(200.0) - 100
    leaves = leaves64(case.hidden, case.weight, case.bias)
    logprob, entropy = logprob64(*leaves, case.targets, TEMPERATURE)
    # Policies far apart would overflow the ratio, which is not the matter here.
    case.old = case.ref = logprob.detach().float()
    stats, d_hidden, *_ = case.run()
    assert relative_error(stats[1], logprob.detach(), 1.0) <= FORWARD[torch.float32]
    assert relative_error(stats[5], entropy.detach(), 1.0) <= FORWARD[torch.float32]
    (expected,) = torch.autograd.grad((logprob * -case.advantages).sum() / DENOMINATOR, leaves[:1])
    # ref and old are rounded to float32, at log-probs of 1e4.
    assert relative_error(d_hidden, expected, 0.0) <= 2e-3


def test_half_precision_keeps_small_probabilities() -> None:
    """p / denominator is below the least float16: divided before the products, d logits would keep the target alone."""
    T, H, V, denominator = 4, 32, 4096, 1e4
    generator = torch.Generator().manual_seed(0)
    hidden = (0.01 * torch.randn(T, H, generator=generator)).half()
    weight = (8 + torch.randn(V, H, generator=generator)).half()
    targets, advantages = torch.arange(T), torch.ones(T)
    given = (hidden, weight, None, targets, advantages, None, None)
    _, d_hidden, *_ = linear_grpo_loss.forward(*given, 1.0, 0.2, 0.2, 0.0, denominator, False, True, False, False)
    leaves = leaves64(hidden, weight)
    logprob, _ = logprob64(*leaves, None, targets, 1.0)
    (expected,) = torch.autograd.grad(-logprob.sum() / denominator, leaves[:1])
    assert relative_error(d_hidden, expected, 0.0) < 5e-3


def sparse(rows: int, stride: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width] with rows `stride` elements apart in memory that exists only where it is touched."""
    size = ((rows - 1) * stride + width) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).as_strided((rows, width), (stride, 1))


@pytest.mark.usefixtures("guarded")
def test_offsets_beyond_32_bits() -> None:
    T, V, stride = 4, 40, 2**30 + 64
    logits, dlogits = sparse(T, stride, V, torch.float32), sparse(T, stride, V, torch.bfloat16)
    logits.copy_(torch.randn(T, V, generator=torch.Generator().manual_seed(0)))
    targets, stats = torch.arange(T), torch.empty(6, T)
    advantages = torch.ones(T)
    assert (T - 1) * stride > 2**31
    linear_grpo_loss._rows_kernel[(T,)](
        logits,
        dlogits,
        None,
        targets,
        advantages,
        None,
        None,
        None,
        stats,
        T,
        V,
        logits.stride(0),
        dlogits.stride(0),
        _shared.LOG2E.value,
        1.0,
        0.8,
        1.2,
        0.0,
        0.0,
        ENTROPY=False,
        GRADIENT=True,
        BLOCK=16,
    )
    log_p = logits.to(F64).log_softmax(-1)
    assert relative_error(stats[1], log_p.diagonal(), 1.0) < 1e-6
    hit = torch.nn.functional.one_hot(targets, V)
    assert relative_error(dlogits, log_p.exp() - hit, 0.0) < 1e-2


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("T", [1, 127, 128, 1000])
@pytest.mark.parametrize("old, ref", [(True, True), (True, False), (False, True), (False, False)])
def test_ratio_loss(T: int, old: bool, ref: bool) -> None:
    generator = torch.Generator().manual_seed(T)
    logprob = -3 * torch.rand(T, generator=generator)
    advantages = torch.randn(T, 2, generator=generator)[:, 0]
    near = [logprob + 0.4 * torch.randn(T, generator=generator) for _ in range(2)]
    before, reference = (x if wanted else None for x, wanted in zip(near, (old, ref), strict=True))
    stats = grpo_ratio_loss.forward(logprob, advantages, reference, before, *LOSS.values())

    leaf = logprob.to(F64).requires_grad_()
    ratio = torch.exp(leaf - (leaf.detach() if before is None else before))
    whole, bounded = ratio * advantages, ratio.clamp(0.8, 1.28) * advantages
    k3 = torch.zeros(T, dtype=F64) if reference is None else (reference - leaf).exp() - (reference - leaf) - 1
    loss = -torch.minimum(whole, bounded) + LOSS["kl_coef"] * k3
    (slope,) = torch.autograd.grad(loss.sum(), [leaf])
    truth = [loss, k3, ratio, (bounded < whole).to(F64), slope]
    for row, expected in zip(stats, truth, strict=True):
        assert relative_error(row, expected.detach(), 1.0) < 2e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_ratio_loss_in_any_program_order(shuffled_programs: Callable, seed: int) -> None:
    rows = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    expected = grpo_ratio_loss.forward(*rows, *LOSS.values())
    with shuffled_programs(seed):
        assert torch.equal(grpo_ratio_loss.forward(*rows, *LOSS.values()), expected)


def test_a_log_prob_of_nan_shows() -> None:
    rows = torch.zeros(4, 3)
    rows[0, 1] = torch.nan
    for old in (rows[3], None):
        stats = grpo_ratio_loss.forward(rows[0], rows[1], rows[2], old, *LOSS.values())
        assert stats[0].isnan().tolist() == [False, True, False]
