"""linear, its weight gradient and gated_mlp against fp64 in every implementation and on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.cpu import linear as module
from gadcore.kernels.cpu.gated_mlp import gated_mlp
from gadcore.kernels.cpu.linear import linear, weight_gradient
from tests.support.levels import at_level

IMPLS = [("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[actual.dtype]
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= tolerance * (expected.norm() + 1)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 3), (5, 7, 3), (1, 130, 64, 33), (2, 3, 40, 8), (0, 4, 5), (331, 99, 70)]
)
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


@pytest.fixture(params=["", "wide", "avx2", "scalar"])
def level(request):
    """ "wide" is the code of AVX-512 on any CPU with AVX2."""
    with at_level(request.param):
        yield request.param


# Around the 6 rows and 64 columns of a tile, the 768 columns of a block and the 208 rows of a depth.
@pytest.mark.native
@pytest.mark.parametrize("tokens", [0, 1, 3, 207, 208, 209, 450])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 63), (6, 64), (7, 65), (13, 769), (40, 900)])
def test_weight_gradient(level, tokens, n, k) -> None:
    grad, x = leaf(tokens, n).detach(), leaf(tokens, k, seed=1).detach()
    assert_close(weight_gradient(grad, x), grad.double().T @ x.double())
    wide = leaf(tokens, 2 * k, seed=2).detach()[:, k // 2 : k // 2 + k]
    assert_close(weight_gradient(grad, wide), grad.double().T @ wide.double())
    columns = leaf(k, tokens, seed=3).detach().T
    assert_close(weight_gradient(grad, columns), grad.double().T @ columns.double())


@pytest.mark.native
@pytest.mark.parametrize("level", ["wide"], indirect=True)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit_of_a_weight_gradient(level, threads) -> None:
    grad, x = leaf(300, 200).detach(), leaf(300, 800, seed=1).detach()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = weight_gradient(grad, x)
        torch.set_num_threads(threads)
        assert torch.equal(weight_gradient(grad, x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
@pytest.mark.parametrize("tokens", [0, 3, 209])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 65), (13, 769)])
def test_a_weight_gradient_that_is_added(level, tokens, n, k) -> None:
    grad, x, before = leaf(tokens, n).detach(), leaf(tokens, k, seed=1).detach(), leaf(n, k, seed=2).detach()
    for into in (before.clone(), before.T.clone(memory_format=torch.contiguous_format).T):
        torch.ops.gadcore.cpu_add_weight_gradient(into, grad, x)
        assert_close(into, before.double() + grad.double().T @ x.double())


@pytest.mark.native
def test_what_no_weight_gradient_can_be_added_to() -> None:
    with pytest.raises(RuntimeError, match=r"into must be float32 \[3, 6\], is Float \[6, 3\]"):
        torch.ops.gadcore.cpu_add_weight_gradient(torch.ones(6, 3), torch.ones(4, 3), torch.ones(4, 6))


def twice(forward, inputs: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], bool]:
    """The weights' gradients after two passes, and whether the second left them where the first had."""
    forward(inputs[0]).sum().backward()
    places = [w.grad.data_ptr() for w in weights]
    forward(inputs[1]).square().sum().backward()
    return [w.grad for w in weights], places == [w.grad.data_ptr() for w in weights]


@pytest.mark.native
@pytest.mark.parametrize("op", ["linear", "gated_mlp"])
def test_later_passes_add_in_place(op) -> None:
    def weights() -> list[Tensor]:
        return [leaf(7, 4, seed=1)] if op == "linear" else [leaf(7, 4, seed=1), leaf(7, 4, seed=2), leaf(4, 7, seed=3)]

    def forward(x: Tensor, given: list[Tensor], in_place: bool) -> Tensor:
        if op == "linear":
            return linear(x, *given, impl="cpu", in_place=in_place)
        return gated_mlp(x, *given, in_place=in_place)

    inputs, seen = [leaf(5, 4, seed=4).detach(), leaf(2, 3, 4, seed=5).detach()], []
    here, apart = weights(), weights()
    for weight in here:
        weight.register_hook(seen.append)
    added, stayed = twice(lambda x: forward(x, here, True), inputs, here)
    assert stayed and [grad is None for grad in seen] == [False] * len(here) + [True] * len(here)
    expected, _ = twice(lambda x: forward(x, apart, False), inputs, apart)
    for actual, other in zip(added, expected, strict=True):
        assert_close(actual, other.double())


def test_a_weight_that_is_no_leaf_gets_its_gradient_from_autograd() -> None:
    leaf_weight = leaf(7, 4)
    for _ in range(2):
        linear(leaf(5, 4, seed=1), leaf_weight * 2, impl="cpu", in_place=True).sum().backward()
    assert_close(leaf_weight.grad, 4 * leaf(5, 4, seed=1).detach().double().sum(0).expand(7, 4))


@pytest.mark.native
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 33), (300,)])
@pytest.mark.parametrize(("hidden", "inner", "out"), [(4, 7, 4), (48, 130, 48), (20, 9, 5)])
@pytest.mark.parametrize("onednn", [False, True])
def test_gated_mlp(monkeypatch, shape, hidden, inner, out, onednn) -> None:
    monkeypatch.setattr("gadcore.kernels.cpu.gated_mlp.onednn_is_faster", lambda: onednn)
    shapes = [(*shape, hidden), (inner, hidden), (inner, hidden), (out, inner)]
    operands = [leaf(*s, seed=i) for i, s in enumerate(shapes)]
    grad = leaf(*shape, out, seed=9).detach()
    y = gated_mlp(*operands)
    kept = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, kept)

    wide = [t.detach().double().requires_grad_() for t in operands]
    expected = F.linear(F.silu(F.linear(wide[0], wide[1])) * F.linear(wide[0], wide[2]), wide[3])
    expected.backward(grad.double())
    assert_close(y, expected)
    for actual, other in zip(operands, wide, strict=True):
        assert_close(actual.grad, other.grad)


@pytest.mark.native
@pytest.mark.parametrize("frozen", range(4))
def test_gated_mlp_with_frozen_operands(frozen) -> None:
    operands = [leaf(5, 4), leaf(7, 4), leaf(7, 4), leaf(4, 7)]
    operands[frozen].requires_grad_(False)
    gated_mlp(*operands).sum().backward()
    assert [t.grad is None for t in operands] == [i == frozen for i in range(4)]


@pytest.mark.native
def test_gated_mlp_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(ValueError, match="gated_mlp: up must be float32 on the CPU, is torch.float64 on cpu"):
        gated_mlp(leaf(5, 4), leaf(7, 4), leaf(7, 4, dtype=torch.float64), leaf(4, 7))
