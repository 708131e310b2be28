"""Every implementation of every kernel against float64: results and every gradient, over the grid of kernel_grid.py.

Under TRITON_INTERPRET=1 these are the Triton kernels, run by Triton's interpreter; otherwise the references and the
native CPU ops. All memory is filled with NaN before a kernel gets it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support import grid_checks
from tests.support.kernel_grid import (
    F64,
    GROUP_CASES,
    GRPO_CASES,
    HEAD_CASES,
    KERNEL_DTYPES,
    RATIO_CASES,
    RATIO_TOKENS,
    WIDTHS,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    IMPLS = [("triton", dtype) for dtype in KERNEL_DTYPES]
else:
    IMPLS = [("reference", F64), *[(impl, dtype) for impl in ("reference", "cpu") for dtype in KERNEL_DTYPES]]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


implementations = pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=name_of)
of_logprobs = pytest.mark.parametrize(
    ("impl", "dtype"), [(impl, dtype) for impl, dtype in IMPLS if dtype in (F64, torch.float32)], ids=name_of
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@implementations
@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_linear_logprob(case, impl, dtype) -> None:
    grid_checks.check_linear_logprob(case, impl, dtype)


@implementations
@pytest.mark.parametrize(("case", "ratio"), GRPO_CASES, ids=str)
def test_linear_grpo_loss(case, ratio, impl, dtype) -> None:
    grid_checks.check_linear_grpo_loss(case, ratio, impl, dtype)


@of_logprobs
@pytest.mark.parametrize("ratio", RATIO_CASES, ids=str)
@pytest.mark.parametrize("tokens", RATIO_TOKENS)
def test_grpo_ratio_loss(tokens, ratio, impl, dtype) -> None:
    grid_checks.check_grpo_ratio_loss(tokens, ratio, impl, dtype)


@implementations
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_bt_score(case, width, impl, dtype) -> None:
    grid_checks.check_bt_score(case, width, impl, dtype)


@implementations
def test_equal_rows_score_equally_to_the_bit_wherever_they_lie(impl, dtype) -> None:
    grid_checks.check_equal_rows(impl, dtype)


@implementations
def test_tied_weights_get_the_gradient_of_both_uses(impl, dtype) -> None:
    grid_checks.check_tied_weights(impl, dtype)
