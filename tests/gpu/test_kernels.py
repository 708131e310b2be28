"""The grid of tests/kernels on a GPU: the Triton kernels compiled, and the references."""

from __future__ import annotations

import pytest
import torch

from tests.support import grid_checks
from tests.support.kernel_grid import (
    GROUP_CASES,
    GRPO_CASES,
    HEAD_CASES,
    KERNEL_DTYPES,
    RATIO_CASES,
    RATIO_TOKENS,
    WIDTHS,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_grid(impl, dtype) -> None:
    for case in HEAD_CASES:
        grid_checks.check_linear_logprob(case, impl, dtype, "cuda")
    for case, ratio in GRPO_CASES:
        grid_checks.check_linear_grpo_loss(case, ratio, impl, dtype, "cuda")
    for tokens in RATIO_TOKENS if dtype == torch.float32 else []:
        for ratio in RATIO_CASES:
            grid_checks.check_grpo_ratio_loss(tokens, ratio, impl, dtype, "cuda")
    for groups in GROUP_CASES:
        for width in WIDTHS:
            grid_checks.check_bt_score(groups, width, impl, dtype, "cuda")
    grid_checks.check_equal_rows(impl, dtype, "cuda")
    grid_checks.check_tied_weights(impl, dtype, "cuda")
