"""The memory that a call needs."""

from __future__ import annotations

import pytest
import torch

from bench import peak


def test_extra_peak_sees_what_a_call_used_and_gave_back() -> None:
    size = 64 * 2**20

    def call() -> float:
        return float(torch.ones(size // 4).sum())

    call()
    total, extra = peak.extra_peak(call)
    if extra is None:
        pytest.skip("this system does not let a process reset its peak")
    assert total == size // 4
    # The system counts resident pages in batches.
    assert 0.95 * size < extra < 1.25 * size
