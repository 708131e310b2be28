"""linear against fp64 in every implementation, and where it leaves the work to F.linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels import linear as module
from gadcore.kernels.linear import linear

IMPLS = [("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[actual.dtype]
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= tolerance * (expected.norm() + 1)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (1, 130, 64, 33), (2, 3, 40, 8), (0, 4, 5), (331, 576, 192)])
def test_results_and_gradients(impl, dtype, shape, with_bias) -> None:
    *rows, k, n = shape
    x, weight, bias, grad = (
        leaf(*s, dtype=dtype, seed=i) for i, s in enumerate([(*rows, k), (n, k), (n,), (*rows, n)])
    )
    y = linear(x, weight, bias if with_bias else None, impl=impl)
    y.backward(grad.detach())

    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = F.linear(wide[0], wide[1], wide[2] if with_bias else None)
    expected.backward(grad.detach().double())
    assert_close(y, expected)
    for actual, other in zip((x, weight, bias) if with_bias else (x, weight), wide, strict=False):
        assert_close(actual.grad, other.grad)


def test_operands_that_are_views() -> None:
    x, weight, grad = leaf(6, 80)[:, 5:25], leaf(30, 20)[7:17], leaf(10, 6).T
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, expected = linear(*inputs, impl="cpu"), F.linear(*wide)
    y.backward(grad.detach())
    expected.backward(grad.detach().double())
    assert_close(y, expected)
    for actual, other in zip(inputs, wide, strict=True):
        assert_close(actual.grad, other.grad)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen) -> None:
    inputs = [leaf(4, 6), leaf(3, 6), leaf(3)]
    inputs[frozen].requires_grad_(False)
    linear(*inputs, impl="cpu").sum().backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(3)]


def test_auto_is_onednn_only_where_that_is_faster(monkeypatch) -> None:
    def made_by(x: Tensor, weight: Tensor) -> str:
        return type(linear(x, weight).grad_fn).__name__

    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    assert made_by(leaf(4, 6), leaf(3, 6)) == "_LinearBackward"
    assert made_by(leaf(4, 6, dtype=torch.float64), leaf(3, 6, dtype=torch.float64)) != "_LinearBackward"
    assert made_by(leaf(4, 6).to("meta"), leaf(3, 6).to("meta")) != "_LinearBackward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(leaf(4, 6), leaf(3, 6)).dtype == torch.bfloat16
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    assert made_by(leaf(4, 6), leaf(3, 6)) != "_LinearBackward"


@pytest.mark.parametrize("arguments", [dict(impl="cpu", dtype=torch.float64), dict(impl="triton")])
def test_refusals(arguments) -> None:
    dtype = arguments.pop("dtype", torch.float32)
    with pytest.raises(ValueError, match="linear: impl"):
        linear(leaf(4, 6, dtype=dtype), leaf(3, 6, dtype=dtype), **arguments)
