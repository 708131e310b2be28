"""Matrices in 8 and 4 bits against their definitions written out entry by entry, and against bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from gadcore.kernels import quantised
from gadcore.kernels.quantised import NF4, dynamic_values, quantise, quantised_bytes
from tests.support.quantised import int8_values, nf4_values

# The last block of entries and that of scales are whole; neither is; rows end inside of blocks.
SHAPES = [(16, 256), (12, 1538), (5, 26)]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)


def assert_kept(dense: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but where rounding has taken a scale that lies between two of its values to the other one."""
    far = (dense - expected).abs() > 1e-6 * expected.abs() + 1e-9
    assert far.float().mean() < 0.01
    torch.testing.assert_close(dense, expected, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_what_the_definition_says(shape, dtype) -> None:
    weight = matrix(shape, dtype)
    kept = quantise(weight, "nf4")
    expected = torch.tensor(nf4_values(weight.float().tolist()))
    assert_kept(kept.dense(torch.float32), expected)
    # Rounded once.
    assert torch.equal(kept.dense(torch.bfloat16), kept.dense(torch.float32).bfloat16())
    assert torch.equal(kept.dense(torch.float64), kept.dense(torch.float32).double())


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_are_what_the_definition_says(shape) -> None:
    weight = matrix(shape)
    kept = quantise(weight, "int8")
    expected = torch.tensor(int8_values(weight.tolist()))
    torch.testing.assert_close(kept.dense(torch.float32), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(kept.dense(torch.float64), kept.dense(torch.float32).double())
    assert torch.equal(kept.dense(torch.bfloat16), kept.dense(torch.float32).bfloat16())


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("nf4", 0.1)])
def test_little_of_a_weight_is_lost(kind, most) -> None:
    weight = matrix((96, 512))
    assert 0 < (quantise(weight, kind).dense(torch.float32) - weight).norm() / weight.norm() < most


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_matrix_with_rows_and_blocks_of_zeros(kind) -> None:
    weight = matrix((8, 256))
    weight[2] = 0
    dense = quantise(weight, kind).dense(torch.float32)
    assert dense.isfinite().all() and not dense[2].any()
    zeros = quantise(torch.zeros(4, 128), kind).dense(torch.float32)
    assert torch.equal(zeros, torch.zeros(4, 128))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_tensors(kind, shape) -> None:
    kept = quantise(matrix(shape), kind)
    assert quantised_bytes(kind, *shape) == sum(tensor.nbytes for tensor in kept.tensors().values())
    # Without memory, as a plan asks.
    there = quantise(matrix(shape).to("meta"), kind)
    assert {n: (t.shape, t.dtype) for n, t in there.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in kept.tensors().items()
    }


def test_the_values_of_both_codes() -> None:
    assert list(NF4) == sorted(NF4) and len(NF4) == 16 and {-1.0, 0.0, 1.0} <= set(NF4)
    values = dynamic_values()
    assert values == sorted(values) and len(set(values)) == 256 and {0.0, 1.0} <= set(values)
    assert min(values) > -1 and min(abs(v) for v in values if v) == pytest.approx(0.55e-6)


def test_an_odd_row_has_no_four_bits() -> None:
    with pytest.raises(ValueError, match=r"two entries of a row in a byte, and this matrix is \[4, 7\]"):
        quantise(torch.ones(4, 7), "nf4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (70, 1538)])
def test_the_package_makes_and_reads_the_same_bytes(shape, dtype) -> None:
    """What computes on CUDA, by the package's way on a CPU."""
    pytest.importorskip("bitsandbytes")
    weight = matrix(shape, dtype)
    ours, theirs = quantise(weight, "nf4"), quantised._by_library(weight)
    assert torch.equal(ours.data, theirs.data)
    torch.testing.assert_close(ours.steps, theirs.steps)
    torch.testing.assert_close(ours.mean, theirs.mean)
    # One that lies between two of the 256 values may be taken for either.
    assert (ours.scales.int() - theirs.scales.int()).abs().max() <= 1
    assert (ours.scales != theirs.scales).float().mean() < 0.01
    for wanted in (torch.float32, torch.bfloat16, torch.float64):
        for kept in (ours, theirs):
            tolerance = 1e-2 if wanted == torch.bfloat16 else 1e-6
            read = quantised._dense_by_library(kept, wanted)
            torch.testing.assert_close(kept.dense(wanted), read, rtol=tolerance, atol=1e-9)


def test_a_missing_package_is_told(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match="nf4 on a GPU needs the package bitsandbytes: `pip install 'gadcore"):
        quantised._by_library(matrix((4, 64)))
