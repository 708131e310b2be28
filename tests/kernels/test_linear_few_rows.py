"""linear_few_rows: results over the shapes of decoding, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gadcore.kernels.cpu.linear_few_rows import MAX_ROWS, Adapters, beside, decoding_linear, linear_few_rows
from tests.support.kernel_grid import F64, RECORD
from tests.support.levels import LEVELS, at_level


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


def adapted(inner: int, outer: int, ranks: Sequence[int], seed: int = 0) -> Adapters:
    """As many B as ranks, of neighbouring columns that leave some of the product's at both ends, and one in between."""
    generator = torch.Generator().manual_seed(seed)
    each = (outer - 3) // len(ranks)
    ups = [torch.randn(each - (i == 0), rank, generator=generator) for i, rank in enumerate(ranks)]
    starts = [1 + i * each for i in range(len(ranks))]
    return Adapters(torch.randn(sum(ranks), inner, generator=generator) / inner**0.5, ups, starts, -0.75)


def whole(weight: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    """W + scale B A, float64."""
    out = weight.to(F64).clone()
    downs = adapters.down.to(F64).split([b.shape[1] for b in adapters.ups])
    for a, b, start in zip(downs, adapters.ups, adapters.starts, strict=True):
        out[start : start + len(b)] += adapters.scale * b.to(F64) @ a
    return out


@pytest.mark.native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 17, 32, 33, 64])
@pytest.mark.parametrize(
    ("inner", "outer", "ranks"), [(20, 7, [1]), (64, 48, [3, 16]), (96, 131, [16, 16, 16]), (1536, 200, [64])]
)
def test_adapters_against_float64(inner: int, outer: int, ranks: list[int], rows: int, level: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, outer))
    bias, adapters = torch.randn(outer, generator=generator), adapted(inner, outer, ranks)
    with at_level(level):
        actual = beside(refuse, adapters)(x, weight, bias)
        alone = [beside(refuse, adapters)(x[i : i + 1], weight, bias) for i in range(rows)]
    truth = x.to(F64) @ whole(weight, adapters).T + bias
    torch.testing.assert_close(actual.to(F64), truth, rtol=1e-5, atol=2e-5 * inner**0.5)
    # There it is torch's product.
    if level not in ("scalar", "baseline"):
        assert torch.equal(torch.cat(alone), actual), "a row depends on the others"


def refuse(*_: object) -> torch.Tensor:
    raise AssertionError("the product was asked, although one native call does it")


@pytest.mark.parametrize(("rows", "dtype"), [(MAX_ROWS + 1, torch.float32), (5, F64)])
def test_what_one_call_does_not_take_is_added_to_the_product(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 24), (40, 24), (40,)))
    adapters = adapted(24, 40, [2, 5])
    adapters = adapters._replace(down=adapters.down.to(dtype), ups=[b.to(dtype) for b in adapters.ups])
    actual = beside(lambda x, w, b: F.linear(x, w, b), adapters)(x, weight, bias)
    truth = x.to(F64) @ whole(weight, adapters).T + bias
    torch.testing.assert_close(actual.to(F64), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.native
def test_adapters_that_are_refused() -> None:
    good, x, weight = adapted(24, 40, [2, 5]), torch.randn(3, 24), torch.randn(40, 24)

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            beside(refuse, good._replace(**changed))(x, weight)

    refused(r"A must be contiguous float32 \[sum of ranks, 24\], is Float \[7, 23\]", down=torch.randn(7, 23))
    refused("is Double", down=good.down.double())
    refused("A must be contiguous", down=torch.randn(24, 7).T)
    refused("A has 6 rows, and all B have 7 columns", down=torch.randn(6, 24))
    refused("as many starts as B, got 1 and 2", starts=[0])
    refused(r"B \[18, 5\] from column 23 on does not fit 40 columns", starts=[0, 23])
    refused("from column -1 on does not fit", starts=[-1, 20])
    refused(r"B must be contiguous float32 \[n, rank\]", ups=[good.ups[0], torch.randn(5, 18).T])
