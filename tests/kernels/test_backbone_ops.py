"""rms_norm, swiglu and rotary against fp64, in every implementation, and the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gadcore.kernels.cpu.rms_norm import rms_norm
from gadcore.kernels.cpu.swiglu import swiglu
from gadcore.kernels.rotary import rotary

SHAPES = [(1, 1), (5, 7), (64, 33), (130, 576), (2, 3, 40)]


def leaf(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() <= tolerance * (expected.norm() + 1)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


IMPLS = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.native),
    *(("reference", dtype) for dtype in (torch.float32, torch.float64)),
]


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_rms_norm(impl, dtype, shape, shift) -> None:
    x, weight, grad = (leaf(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, shape[-1:], shape]))
    y = rms_norm(x, weight, eps=1e-2, shift=shift, impl=impl)
    y.backward(grad.detach())

    wide, scale = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * (scale + shift)
    expected.backward(grad.detach().double())
    assert_close(y, expected, dtype)
    assert_close(x.grad, wide.grad, dtype)
    assert_close(weight.grad, scale.grad, dtype)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(impl, dtype, shape) -> None:
    gate, up, grad = (leaf(*shape, dtype=dtype, seed=i) for i in range(3))
    y = swiglu(gate, up, impl=impl)
    y.backward(grad.detach())

    g, u = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    expected = F.silu(g) * u
    expected.backward(grad.detach().double())
    assert_close(y, expected, dtype)
    assert_close(gate.grad, g.grad, dtype)
    assert_close(up.grad, u.grad, dtype)


@pytest.mark.native
def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4], requires_grad=True)
    y = swiglu(gate, torch.ones(6), impl="cpu")
    y.sum().backward()
    assert y.tolist() == pytest.approx([0, 0, 0, 0, 88, 1e4], abs=1e-30)
    assert gate.grad.tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1], abs=1e-30)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(1, 1, 2), (5, 3, 8), (7, 2, 50), (33, 9, 64), (3, 0, 4), (0, 2, 4)]
)
@pytest.mark.parametrize("by_head", [False, True])
def test_rotary(impl, dtype, tokens, heads, width, by_head) -> None:
    shape = (heads, tokens, width) if by_head else (tokens, heads, width)
    stored = leaf(*shape, dtype=dtype, seed=9)
    x = stored.transpose(0, 1) if by_head else stored
    cos, sin, grad = (leaf(*s, dtype=dtype, seed=i).detach() for i, s in enumerate([(tokens, width)] * 2 + [x.shape]))
    y = rotary(x, cos, sin, impl=impl)
    (actual,) = torch.autograd.grad(y, x, grad)

    wide, c, s = x.detach().double().requires_grad_(), cos.double(), sin.double()
    h = width // 2
    turned = torch.empty(tokens, heads, width, dtype=torch.float64)
    for i in range(h):
        turned[..., i] = wide[..., i] * c[:, None, i] - wide[..., h + i] * s[:, None, i]
        turned[..., h + i] = wide[..., h + i] * c[:, None, h + i] + wide[..., i] * s[:, None, h + i]
    (expected,) = torch.autograd.grad(turned, wide, grad.double())
    assert_close(y, turned, dtype)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("shape", [(6, 2, 7), (6, 8), (5, 2, 8)])
def test_rotary_refuses_what_does_not_fit(shape) -> None:
    with pytest.raises(ValueError, match=r"x must be .T, H, D. with an even D, cos and sin .T, D. of one floating dt"):
        rotary(torch.ones(shape), torch.ones(6, 8), torch.ones(6, 8))


def test_rotary_computes_16_bits_in_float32_and_rounds_once() -> None:
    """As under autocast: 16-bit queries by cosines in float32; the dtype of the queries is kept, both ways."""
    x, cos, sin = leaf(5, 3, 8, dtype=torch.float32, seed=0), *torch.randn(2, 5, 8)
    narrow = x.detach().bfloat16().requires_grad_()
    y = rotary(narrow, cos, sin)
    wide = rotary(narrow.detach().float().requires_grad_(), cos, sin, impl="reference")
    assert y.dtype == torch.bfloat16 and torch.equal(y, wide.bfloat16())
    (grad,) = torch.autograd.grad(y.float().sum(), narrow)
    assert grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="of one floating dtype"):
        rotary(narrow, cos, sin.double())


@pytest.mark.native
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads) -> None:
    def run():
        x, weight, grad = (leaf(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(700, 96), (96,), (700, 96)]))
        y = swiglu(rms_norm(x, weight, eps=1e-6, impl="cpu"), x, impl="cpu")
        y.backward(grad.detach())
        turned = rotary(x.view(700, 4, 24), x[:, :24], x[:, 24:48], impl="cpu")
        return y.detach(), x.grad, weight.grad, turned.detach()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(threads)
    together = run()
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.native
def test_strided_rows_and_what_does_not_fit() -> None:
    x = torch.randn(6, 20)[:, ::2]
    torch.testing.assert_close(
        rms_norm(x, torch.ones(10), eps=1e-6, impl="cpu"), rms_norm(x, torch.ones(10), eps=1e-6, impl="reference")
    )
    with pytest.raises(ValueError, match="weight must be .H. for x"):
        rms_norm(x, torch.ones(9), eps=1e-6)
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match=r"impl=.cpu. computes in torch.float32"):
        swiglu(x.double(), x.double(), impl="cpu")
