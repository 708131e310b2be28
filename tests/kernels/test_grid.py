"""Every implementation of every op against float64: results and every gradient, over the grids of grid_checks.py.

Under TRITON_INTERPRET=1 these are the Triton kernels, run by Triton's interpreter; otherwise the references and the
native CPU ops. All memory is filled with NaN before a kernel gets it. The interpreter takes minutes for its grid: a
third of the cases runs always, all of them by `make test-triton GRID=`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import grid_checks
from tests.support.grid_checks import GRIDS, dtypes_of

IMPLS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference", "cpu"]
# Of the interpreter's cases, one in so many runs unasked.
SAMPLE = 3


def params(op: str, *arguments: Any) -> Iterator[Any]:
    """(*arguments, impl, dtype) for every implementation of the op that runs in this process."""
    for impl in IMPLS:
        for dtype in dtypes_of(op, impl):
            values = (*arguments, impl, dtype)
            name = "-".join("-".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
            marks = [pytest.mark.native] if impl == "cpu" else []
            # By its name: every shape and dtype has its turn, and a case stays in the sample when others are added.
            if impl == "triton" and zlib.crc32(name.encode()) % SAMPLE:
                marks.append(pytest.mark.by_hand)
            yield pytest.param(*values, id=name.replace("torch.", ""), marks=marks)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("op", "case", "impl", "dtype"),
    [param for op, grid in GRIDS.items() for case in grid.cases for param in params(op, op, case)],
)
def test_against_float64(op: str, case: tuple[Any, ...], impl: str, dtype: torch.dtype) -> None:
    GRIDS[op].check(*case, impl, dtype)


@pytest.mark.parametrize(("impl", "dtype"), list(params("bt_score")))
def test_equal_rows_score_equally_to_the_bit_wherever_they_lie(impl: str, dtype: torch.dtype) -> None:
    grid_checks.check_equal_rows(impl, dtype)


@pytest.mark.parametrize(("impl", "dtype"), list(params("linear_logprob")))
def test_tied_weights_get_the_gradient_of_both_uses(impl: str, dtype: torch.dtype) -> None:
    grid_checks.check_tied_weights(impl, dtype)
