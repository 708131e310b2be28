"""linear_few_rows: results over the shapes of decoding, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gadcore.kernels.cpu.linear_few_rows import MAX_ROWS, decoding_linear, linear_few_rows
from tests.support.kernel_grid import F64, RECORD


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("reference", F64), ("reference", torch.float32), pytest.param("cpu", torch.float32, marks=pytest.mark.native)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 64])
@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (7, 5), (64, 48), (100, 33), (577, 130), (576, 1536)])
def test_against_float64(inner: int, outer: int, rows: int, with_bias: bool, impl, dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    # x: columns of a wider tensor.
    x = torch.randn(rows, inner + 3, generator=generator, dtype=F64).to(dtype)[:, :inner]
    weight = torch.randn(outer, inner, generator=generator, dtype=F64).to(dtype)
    bias = torch.randn(outer, generator=generator, dtype=F64).to(dtype) if with_bias else None
    truth = x.to(F64) @ weight.to(F64).T + (0 if bias is None else bias.to(F64))
    actual = linear_few_rows(x, weight, bias, impl=impl)
    assert actual.dtype == dtype
    RECORD.check("linear_few_rows", impl, dtype, [(actual, truth)], [])


@pytest.mark.native
def test_weights_of_any_strides() -> None:
    x, weight = torch.randn(5, 24), torch.randn(24, 40).T
    torch.testing.assert_close(linear_few_rows(x, weight, impl="cpu"), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    weight = torch.randn(40, 30)[:, 3:27]
    torch.testing.assert_close(linear_few_rows(x, weight, impl="cpu"), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_auto_takes_what_the_native_op_does_not() -> None:
    weight = torch.randn(9, 6)
    many = torch.randn(MAX_ROWS + 1, 6)
    assert torch.equal(linear_few_rows(many, weight), F.linear(many, weight))
    x = torch.randn(3, 6, requires_grad=True)
    linear_few_rows(x, weight).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).expand(3, 6))
    assert linear_few_rows(torch.randn(3, 6).bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.native
def test_what_is_refused() -> None:
    weight = torch.randn(9, 6)
    with pytest.raises(ValueError, match="takes 1 to 64 rows, got 65"):
        linear_few_rows(torch.randn(65, 6), weight, impl="cpu")
    with pytest.raises(ValueError, match="no gradient"):
        linear_few_rows(torch.randn(3, 6, requires_grad=True), weight, impl="cpu")
    with pytest.raises(ValueError, match=r"x must be \[M, K\]"):
        linear_few_rows(torch.randn(3, 5), weight)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, cpu, is 'triton'"):
        linear_few_rows(torch.randn(3, 6), weight, impl="triton")


@pytest.mark.native
def test_the_decoding_layer_computes_the_same_for_any_number_of_rows() -> None:
    linear = decoding_linear()
    weight, bias = torch.randn(33, 24), torch.randn(33)
    for rows in (1, 16, 64, 65):
        x = torch.randn(rows, 24)
        expected = F.linear(x, weight, bias)
        torch.testing.assert_close(linear(x, weight, bias), expected)
        if rows <= 64:
            assert torch.equal(linear(x, weight, bias), linear_few_rows(x, weight, bias, impl="cpu"))
    wide = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(linear(wide, weight.double(), None), F.linear(wide, weight.double()))
