from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gadcore.kernels import _native
from gadcore.kernels.selected_logprob import _op, selected_logprob, selected_logprob_reference

needs_native = pytest.mark.skipif(
    _native.why_missing("selected_logprob") is not None, reason="the native library is not built"
)
IMPLS = ["reference", pytest.param("cpu", marks=needs_native)]
SHAPES = [(1, 1), (3, 1), (5, 2), (7, 7), (4, 8), (2, 9), (3, 16), (5, 31), (2, 1023), (2, 1024), (3, 1025), (2, 5003)]


def _data(rows: int, vocab: int, scale: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, targets, and gradients of logprob and lse."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=g) * scale
    targets = torch.randint(vocab, (rows,), generator=g)
    return logits, targets, torch.randn(rows, generator=g), torch.randn(rows, generator=g)


def _literal(logits: Tensor, targets: Tensor, g: Tensor, h: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """fp64 from the definition, nothing shifted, nothing shared with the code under test."""
    z = logits.double() / temperature
    log_p = z.log_softmax(1)
    p = log_p.exp()
    ignored = targets == -100
    index = targets.clamp_min(0)
    logprob = log_p[torch.arange(len(targets)), index].masked_fill(ignored, 0)
    g = g.double().masked_fill(ignored, 0)
    grad = (h.double() - g)[:, None] * p
    grad[torch.arange(len(targets)), index] += g
    return logprob, z.logsumexp(1), grad / temperature


def _run(
    logits: Tensor, targets: Tensor, g: Tensor, h: Tensor, temperature: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    logprob, lse = selected_logprob(leaf, targets, temperature, impl=impl)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad([logprob, lse], [leaf], [g.to(logprob), h.to(lse)])
    return logprob.detach(), lse.detach(), grad


def _close(actual: Tensor, expected: Tensor, rtol: float = 2e-6, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 0.8, 3.0])
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_forward_and_backward_against_fp64(rows: int, vocab: int, temperature: float, impl: str) -> None:
    data = _data(rows, vocab)
    for actual, expected in zip(_run(*data, temperature, impl), _literal(*data, temperature), strict=True):
        assert actual.dtype == torch.float32
        _close(actual, expected)


def test_reference_in_fp64_passes_gradcheck() -> None:
    logits, targets, _, _ = _data(4, 5)
    targets[2] = -100
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selected_logprob_reference(x, targets, 0.8), leaf)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_extreme_logits(scale: float, impl: str) -> None:
    logits, targets, g, h = _data(6, 700)
    logits = (logits.sign() * scale).contiguous()
    logits[1] = -scale
    logits[2] = scale
    logits[3] = -scale
    logits[3, 5] = scale
    targets[3] = 5
    data = logits, targets, g, h
    logprob, lse, grad = _run(*data, 0.8, impl)
    expected = _literal(*data, 0.8)
    _close(logprob, expected[0], rtol=1e-6, atol=1e-6)
    _close(lse, expected[1], rtol=1e-6, atol=1e-6)
    _close(grad, expected[2], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_maximum_may_be_anywhere_in_the_row(impl: str) -> None:
    _, targets, g, h = _data(4, 5003)
    rising = torch.linspace(-3, 3, 5003)
    data = torch.stack([rising, rising.flip(0), rising.sin(), 4 - rising.abs()]), targets, g, h
    for actual, expected in zip(_run(*data, 0.8, impl), _literal(*data, 0.8), strict=True):
        _close(actual, expected)


@needs_native
def test_a_sure_model_has_a_gradient_to_full_precision() -> None:
    logits = torch.zeros(1, 9)
    logits[0, 3] = 18.0
    data = logits, torch.tensor([3]), torch.ones(1), torch.zeros(1)
    _, _, grad = _run(*data, 1.0, "cpu")
    _close(grad, _literal(*data, 1.0)[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [slice(0, 1500), slice(1200, 2500), slice(3, 2500)])
def test_masked_vocabulary_entries_count_for_nothing(masked: slice, impl: str) -> None:
    logits, targets, g, h = _data(3, 2500)
    logits[:, masked] = float("-inf")
    targets[:] = next(i for i in range(2500) if logits[0, i] > float("-inf"))
    logprob, lse, grad = _run(logits, targets, g, h, 0.7, impl)
    for actual, expected in zip((logprob, lse, grad), _literal(logits, targets, g, h, 0.7), strict=True):
        _close(actual, expected)
    assert torch.equal(grad[:, masked], torch.zeros_like(grad[:, masked]))


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_targets(impl: str) -> None:
    logits, targets, g, h = _data(6, 37)
    targets[[0, 4]] = -100
    logprob, lse, grad = _run(logits, targets, g, torch.zeros_like(h), 0.9, impl)
    assert logprob[[0, 4]].eq(0).all() and grad[[0, 4]].eq(0).all()
    assert grad[[1, 2, 3, 5]].ne(0).all()
    for actual, expected in zip(
        _run(logits, targets, g, h, 0.9, impl), _literal(logits, targets, g, h, 0.9), strict=True
    ):
        _close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl: str) -> None:
    base = torch.randn(9, 80, generator=torch.Generator().manual_seed(1))
    views = [base[:, 3:40], base[::2], base[:, ::2], base.t(), base[:1].expand(5, 80), base[:, 7:8], base[4:4]]
    for view in views:
        _, targets, g, h = _data(*view.shape)
        wide = torch.stack([targets, targets], 1)[:, 0], torch.stack([g, g], 1)[:, 0], h[:1].expand(len(h))
        expected = _literal(view, wide[0], wide[1], wide[2], 0.8)
        for actual, one in zip(_run(view, *wide, 0.8, impl), expected, strict=True):
            _close(actual, one)


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so what the op leaves unwritten shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for rows, vocab in [*SHAPES, (33, 2047)]:
            logits, targets, g, h = _data(rows, vocab)
            targets[0] = -100
            h[0] = 0
            assert all(out.isfinite().all() for out in _run(logits, targets, g, h, 0.8, "cpu"))
    finally:
        torch.use_deterministic_algorithms(before)


@needs_native
def test_nan_logits_are_not_hidden() -> None:
    for position in (0, 8, 36, 1500):
        logits, targets, g, h = _data(3, 1600)
        targets[:] = 1
        logits[1, position] = float("nan")
        logprob, lse, grad = _run(logits, targets, g, h, 0.8, "cpu")
        assert logprob.isnan().tolist() == lse.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_the_threads(threads: int) -> None:
    data = _data(65, 3001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = _run(*data, 0.8, "cpu")
    finally:
        torch.set_num_threads(before)
    for i in (0, 31, 64):
        alone = _run(*(each[i : i + 1] for each in data), 0.8, "cpu")  # type: ignore[arg-type]
        assert all(torch.equal(one[0], many[i]) for one, many in zip(alone, together, strict=True))


@needs_native
def test_opcheck() -> None:
    logits, targets, _, _ = _data(5, 19)
    targets[1] = -100
    op = _op()
    torch.library.opcheck(op, (logits, targets, 0.8))
    torch.library.opcheck(op, (logits.clone().requires_grad_(), targets, 0.8))
    torch.library.opcheck(op, (torch.randn(19, 5).t().requires_grad_(), targets, 1.0))
    _, _, row_max, log_sum = op(logits, targets, 0.8)
    gradients = torch.randn(2, 5)
    torch.library.opcheck(
        torch.ops.gadcore.selected_logprob_backward.default,
        (gradients[0], gradients[1], logits, targets, row_max, log_sum, 0.8),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    logits, targets, g, h = _data(4, 50)
    logits = logits.to(dtype)
    logprob, lse, grad = _run(logits, targets, g, h, 0.8, "auto")
    assert logprob.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    expected = _literal(logits, targets, g, h, 0.8)
    _close(logprob, expected[0])
    _close(grad, expected[2], rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="computes in torch.float32"):
        selected_logprob(logits, targets, impl="cpu")


@needs_native
def test_auto_takes_the_native_op() -> None:
    logits, targets, _, _ = _data(3, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        selected_logprob(logits, targets)
    assert "gadcore::selected_logprob" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("target", [10, -1, -99, 2**40])
def test_targets_outside_the_vocabulary(target: int, impl: str) -> None:
    logits, targets, _, _ = _data(3, 10)
    targets[1] = target
    with pytest.raises(RuntimeError, match=str(target)):
        selected_logprob(logits, targets, impl=impl)  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    logits, targets, _, _ = _data(3, 10)
    wrong: list[tuple[Tensor, Tensor, float, str, str]] = [
        (logits[0], targets, 1.0, "auto", r"\[T, V\]"),
        (logits[:, :0], targets, 1.0, "auto", "V > 0"),
        (logits.long(), targets, 1.0, "auto", "floating"),
        (logits, targets[:2], 1.0, "auto", r"int64 \[3\]"),
        (logits, targets.int(), 1.0, "auto", "int32"),
        (logits, targets, 0.0, "auto", "temperature"),
        (logits, targets, float("nan"), "auto", "temperature"),
        (logits, targets, 1.0, "triton", "triton"),
    ]
    for a, b, temperature, impl, message in wrong:
        with pytest.raises(ValueError, match=message):
            selected_logprob(a, b, temperature, impl=impl)  # type: ignore[arg-type]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logits, targets, _, _ = _data(3, 10)
    _native._notice.cache_clear()
    monkeypatch.setattr(_native, "LIBRARY", tmp_path / "_native.so")
    monkeypatch.delenv("GADCORE_NO_NATIVE", raising=False)
    monkeypatch.setattr(_native, "_unusable", _native._load())
    try:
        with pytest.warns(UserWarning, match=r"_native\.so was not built"):
            result = selected_logprob(logits, targets)
        assert torch.equal(result.logprob, selected_logprob_reference(logits, targets).logprob)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            selected_logprob(logits, targets)
            selected_logprob(logits, targets, impl="reference")
        with pytest.raises(RuntimeError, match="was not built: build it with"):
            selected_logprob(logits, targets, impl="cpu")
        _native.LIBRARY.write_bytes(b"not a library")
        monkeypatch.setattr(_native, "_unusable", _native._load())
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            selected_logprob(logits, targets, impl="cpu")
    finally:
        _native._notice.cache_clear()


@needs_native
def test_scalar_code_agrees() -> None:
    """The code for CPUs without AVX2 runs in a process of its own and passes the same comparison with fp64."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    chosen = "((fp64 or extreme or masked or ignored or strides or maximum) and cpu) or written or hidden"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run([*command, "-k", chosen], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout
