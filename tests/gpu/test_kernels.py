"""The grids of tests/kernels on a GPU: the Triton kernels compiled, and the references."""

from __future__ import annotations

import pytest
import torch

from gadcore.kernels.ops import KERNEL_DTYPES
from tests.support import grid_checks
from tests.support.grid_checks import GRIDS, dtypes_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_grid(impl: str, dtype: torch.dtype) -> None:
    for op, grid in GRIDS.items():
        if dtype in dtypes_of(op, impl):
            for case in grid.cases:
                grid.check(*case, impl, dtype, "cuda")
    grid_checks.check_equal_rows(impl, dtype, "cuda")
    grid_checks.check_tied_weights(impl, dtype, "cuda")
