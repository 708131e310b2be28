"""The kernels of rms_norm: dtypes of autocast, rounding, strides, bounds, races, the order of sums, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from gadcore.kernels.rms_norm import rms_norm, rms_norm_reference
from gadcore.kernels.triton import rms_norm as kernels

F32, BF16 = torch.float32, torch.bfloat16


def run(x: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype | None, impl: str) -> list[Tensor]:
    """y, d x, d weight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = rms_norm(*leaves, eps=1e-6, shift=1.0, dtype=dtype, impl=impl)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def inputs(rows: int, H: int, *dtypes: torch.dtype) -> list[Tensor]:
    """x, weight and a gradient of the norm in three dtypes."""
    generator = torch.Generator().manual_seed(rows + H)
    shapes = ((rows, H), (H,), (rows, H))
    return [torch.randn(s, generator=generator).to(dtype) for s, dtype in zip(shapes, dtypes, strict=True)]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("rows, H", [(1, 1), (7, 96), (300, 128), (3, 4097)])
@pytest.mark.parametrize(
    "x_dtype, weight_dtype, dtype", [(F32, F32, BF16), (BF16, F32, BF16), (BF16, BF16, F32), (F32, F32, None)], ids=str
)
def test_the_reference_in_the_dtypes_of_autocast(
    rows: int, H: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, dtype: torch.dtype | None
) -> None:
    """A residual stream in float32 gives a norm in 16 bits, rounded once, and takes a gradient in float32."""
    x, weight, grad = inputs(rows, H, x_dtype, weight_dtype, dtype or x_dtype)
    actual, expected = (run(x, weight, grad, dtype, impl) for impl in ("triton", "reference"))
    for one, other, of in zip(actual, expected, (dtype or x_dtype, x_dtype, weight_dtype), strict=True):
        assert one.dtype == other.dtype == of and one.is_contiguous()
        tolerance = {F32: 1e-5, BF16: 1e-2}[of]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    wide = rms_norm_reference(x.float(), weight.float(), 1e-6, 1.0, F32)
    # A number in 16 bits is at most half a step of 8 bits away: nothing was rounded before.
    assert ((actual[0].float() - wide).abs() <= wide.abs() * 2**-8 + 1e-6).all()


def test_program_order_changes_no_bit_and_rows_are_added_in_theirs(
    shuffled_programs: Callable[[int], AbstractContextManager[None]],
) -> None:
    x, weight, grad = inputs(1000, 512, F32, F32, BF16)
    expected = run(x, weight, grad, BF16, "triton")
    with shuffled_programs(0):
        assert all(map(torch.equal, run(x, weight, grad, BF16, "triton"), expected))


@pytest.mark.usefixtures("guarded")
def test_any_strides_and_dimensions() -> None:
    x, weight, grad = inputs(12, 64, F32, F32, F32)
    expected = run(x, weight, grad, None, "triton")
    apart = torch.full((12, 80), torch.nan)
    apart[:, :64] = x
    for odd in (apart[:, :64], x.T.contiguous().T):
        assert all(map(torch.equal, run(odd, weight, grad.T.contiguous().T, None, "triton"), expected))
    heads = run(x.view(2, 3, 2, 64), weight, grad.view(2, 3, 2, 64), None, "triton")
    assert heads[0].shape == (2, 3, 2, 64)
    assert all(torch.equal(a.view(b.shape), b) for a, b in zip(heads, expected, strict=True))


def test_no_rows_and_too_long_ones() -> None:
    y, d_x, d_weight = run(torch.ones(0, 8), torch.ones(8), torch.ones(0, 8), BF16, "triton")
    assert y.shape == d_x.shape == (0, 8) and y.dtype == BF16 and d_weight.tolist() == [0] * 8
    with pytest.raises(ValueError, match="rows of at most 16384 numbers, got 16385"):
        kernels.forward(torch.ones(1, 16385), torch.ones(16385), 1e-6, 0.0, F32)
