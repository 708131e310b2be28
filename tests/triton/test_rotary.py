"""The kernel of rotary: transformers' formula, dtypes, strides, nothing in place, bounds, races, launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.offline.interpreter import Observer, observe
from gadcore.kernels.rotary import rotary, rotary_reference
from gadcore.kernels.triton import rotary as kernels

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [F32, BF16, torch.float16]


class Launches(Observer):
    def __init__(self) -> None:
        self.programs: list[int] = []

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[Tensor]) -> None:
        self.programs.append(grid[0])


def angles(T: int, D: int, dtype: torch.dtype = F32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] with equal halves, as models have them."""
    turn = torch.rand(T, D // 2, generator=torch.Generator().manual_seed(seed)).mul(6.3).repeat(1, 2)
    return turn.cos().to(dtype), turn.sin().to(dtype)


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_ways(x: Tensor, cos: Tensor, sin: Tensor, grad: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = rotary(leaf, cos, sin, impl=impl)  # type: ignore[arg-type]
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("angle_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, H, D", [(1, 1, 2), (5, 3, 64), (33, 2, 96), (7, 16, 128), (3, 1, 80), (2, 1, 8192)])
def test_the_reference_both_ways(T: int, H: int, D: int, dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    """Products in float32, rounded once: the same bits, but for the gradient's sum of two products."""
    x, grad = normal(T, H, D, dtype=dtype), normal(T, H, D, dtype=dtype, seed=2)
    cos, sin = normal(2, T, D, dtype=angle_dtype, seed=3)  # halves that differ
    y, d_x = both_ways(x, cos, sin, grad, "triton")
    expected, d_expected = both_ways(x, cos, sin, grad, "reference")
    assert y.dtype == d_x.dtype == dtype and y.is_contiguous() and d_x.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_x, d_expected)


@pytest.mark.parametrize("heads", [(4, 2), (0, 2), (2, 0)])
def test_transformers_formula_on_views_of_a_projection(heads: tuple[int, int]) -> None:
    """[1, H, T, D] as transformers calls it, queries or keys alone too; attention reads the results in place."""
    T, D = 6, 64
    packed = normal(1, T, sum(heads) * D)
    cos, sin = angles(T, D)
    q, k = (x.unflatten(2, (-1, D)).transpose(1, 2) for x in packed.split([n * D for n in heads], 2))
    expected = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    for x, truth in zip((q, k), expected, strict=True):
        rows = x[0].transpose(0, 1)
        y = rotary(rows, cos, sin, impl="triton")
        assert y.is_contiguous() and y.shape == rows.shape
        torch.testing.assert_close(y.transpose(0, 1)[None], truth, rtol=1e-6, atol=1e-6)


def test_nothing_is_launched_where_there_is_nothing_to_turn() -> None:
    seen = Launches()
    cos, sin = angles(5, 64)
    with observe(seen):
        empty = normal(5, 0, 64).requires_grad_()
        y = rotary(empty, cos, sin, impl="triton")
        assert torch.autograd.grad(y.sum(), empty)[0].shape == (5, 0, 64)
        assert rotary(normal(0, 2, 64), *angles(0, 64), impl="triton").shape == (0, 2, 64)
        assert seen.programs == []
        rotary(normal(5, 30, 64), cos, sin, impl="triton")
    assert seen.programs == [-(-5 * 30 // (kernels.TILE // 32))]


@pytest.mark.usefixtures("guarded")
def test_strides_of_every_kind_are_read_in_place_and_nothing_is_written() -> None:
    T, H, D = 5, 3, 16
    x, (cos, sin), grad = normal(T, H, D), angles(T, D), normal(T, H, D, seed=2)
    expected = both_ways(x, cos, sin, grad, "triton")
    for kind in ("transposed", "heads first", "apart"):

        def strided(t: Tensor, kind: str = kind) -> Tensor:
            if kind == "transposed":
                return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
            if kind == "heads first":
                return t.transpose(0, 1).contiguous().transpose(0, 1)
            return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

        odd = [strided(t) for t in (x, cos, sin, grad)]
        before = [t.clone() for t in odd]
        assert all(map(torch.equal, both_ways(*odd, "triton"), expected))
        assert all(map(torch.equal, odd, before))
    summed = rotary(leaf := x.clone().requires_grad_(), cos, sin, impl="triton").sum()
    (of_a_sum,) = torch.autograd.grad(summed, leaf)
    assert torch.equal(of_a_sum, both_ways(x, cos, sin, torch.ones_like(x), "triton")[1])


def test_program_order_changes_no_bit(shuffled_programs: Callable[[int], AbstractContextManager[None]]) -> None:
    x, (cos, sin), grad = normal(50, 3, 128, dtype=BF16), angles(50, 128), normal(50, 3, 128, dtype=BF16, seed=2)
    expected = both_ways(x, cos, sin, grad, "triton")
    with shuffled_programs(0):
        assert all(map(torch.equal, both_ways(x, cos, sin, grad, "triton"), expected))


def test_what_a_checkpoint_kept_is_turned_again_from_what_it_was() -> None:
    """Liger's kernel turns queries where they lie: kept by a checkpoint, they would be turned twice."""
    x, (cos, sin) = normal(6, 2, 64), angles(6, 64)
    gradients = []
    for recompute in (False, True):
        leaf = x.clone().requires_grad_()

        def layer(t: Tensor) -> Tensor:
            return rotary(t, cos, sin, impl="triton").square().mul(t).sum()

        loss = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        assert torch.equal(leaf, x)
    assert torch.equal(*gradients)


def test_the_gradient_of_the_gradient() -> None:
    x, (cos, sin) = normal(3, 2, 8).requires_grad_(), angles(3, 8)
    y = rotary(x, cos, sin, impl="triton")
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(d_x.sum(), x)
    # |y|^2 = |x|^2 where the angles of both halves are equal.
    torch.testing.assert_close(d_x.detach(), 2 * x.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twice, torch.full_like(twice, 2.0), rtol=1e-5, atol=1e-5)


def test_the_reference_is_transformers_formula() -> None:
    x, (cos, sin) = normal(1, 2, 6, 64), angles(6, 64)
    expected, _ = apply_rotary_pos_emb(x, x, cos[None], sin[None])
    assert torch.equal(rotary_reference(x[0].transpose(0, 1), cos, sin).transpose(0, 1)[None], expected)
