"""The gradient of take_rows: order of the sums, rounding, strides, bounds, races, what nothing is taken of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from gadcore.kernels.take_rows import take_rows
from gadcore.kernels.triton import take_rows as kernels

INDEX = torch.tensor([3, 0, 3, 5, 3, 0])  # 1, 2, 4 and the last row are taken by nobody
ROWS, WIDTH = 7, 40


def gradient(grad: Tensor, index: Tensor = INDEX, rows: int = ROWS) -> Tensor:
    x = torch.zeros(rows, grad.shape[1], dtype=grad.dtype, requires_grad=True)
    return torch.autograd.grad(take_rows(x, index, impl="triton"), x, grad)[0]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_repeated_rows_are_added_in_the_order_in_which_they_stand(dtype: torch.dtype) -> None:
    """To the bit: in float32, one after the other, rounded once."""
    grad = (torch.randn(len(INDEX), WIDTH) * 10.0 ** torch.arange(-3, 3)[:, None]).to(dtype)
    expected = torch.zeros(ROWS, WIDTH)
    for row, of in zip(INDEX.tolist(), grad.float(), strict=True):
        expected[row] += of
    assert torch.equal(gradient(grad), expected.to(dtype))


def test_program_order_changes_no_bit(shuffled_programs: Callable[[int], AbstractContextManager[None]]) -> None:
    grad, index = torch.randn(200, 1100), torch.randint(9, (200,))
    expected = gradient(grad, index, 9)
    with shuffled_programs(0):
        assert torch.equal(gradient(grad, index, 9), expected)


@pytest.mark.usefixtures("guarded")
def test_gradients_of_any_strides() -> None:
    grad = torch.randn(len(INDEX), WIDTH)
    expected = gradient(grad)
    apart = torch.full((len(INDEX), WIDTH, 2), torch.nan)
    apart[..., 0] = grad
    for odd in (grad.T.contiguous().T, apart[..., 0]):
        assert torch.equal(kernels.backward(odd, INDEX, ROWS), expected)
    ones = torch.ones(()).expand(len(INDEX), WIDTH)
    assert kernels.backward(ones, INDEX, ROWS)[:, 0].tolist() == [2, 0, 0, 3, 0, 1, 0]


def test_nothing_taken_and_nothing_there() -> None:
    assert torch.equal(gradient(torch.randn(0, 4), INDEX[:0], 3), torch.zeros(3, 4))
    assert gradient(torch.randn(0, 4), INDEX[:0], 0).shape == (0, 4)
    x = torch.randn(ROWS, WIDTH)
    assert torch.equal(take_rows(x, INDEX, impl="triton"), x[INDEX])


def test_what_does_not_fit_is_refused_by_name() -> None:
    for x, index in ((torch.ones(3), INDEX), (torch.ones(3, 2).int(), INDEX), (torch.ones(3, 2), INDEX.int())):
        with pytest.raises(ValueError, match=r"x must be \[N, H\] of a floating dtype, index \[R\] int64, got"):
            take_rows(x, index)
