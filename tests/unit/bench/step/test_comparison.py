"""Ratios, shares of the limit and gates, from the answers of both sides."""

from __future__ import annotations

import math

import pytest

from bench.step import comparison
from tests.support.bench_steps import answer, row


def test_ratios_with_and_without_sampling_memory_and_limit() -> None:
    found = row()
    assert found["clock"] == "cpu"
    assert found["ratio"] == 48 / 8
    assert found["ratio_without_sampling"] == 18 / 6
    assert found["ratio_their_sampling_free"] == 18 / 8
    assert found["memory_ratio"] == 0.5
    assert found["ours"]["peak_over_loaded_bytes"] == 2**29
    # 100 FLOPs at 100 a second are 1 s of the 2 s of generate; 300 of the 4 s of policy; 400 of 8 s in all.
    assert found["limit"]["share"] == {"generate": 0.5, "policy": 0.75, "step": 0.5}


def test_more_threads_are_timed_by_the_wall() -> None:
    ours = [answer(ours=True, generate=2.0, policy=4.0)]
    found = comparison.compare(ours, [answer(ours=False, policy=3.0)], 2)
    assert (found["clock"], found["ours"]["median_s"], found["theirs"]["median_s"]) == ("wall", 12.0, 6.0)


@pytest.mark.parametrize("error", [2e-5, math.nan])
def test_one_error_above_the_tolerance_fails_a_gate(error: float) -> None:
    assert comparison.within({"rewards": 1e-6, "student gradient": 9e-6, "student worst parameter": 9e-5})
    assert not comparison.within({"rewards": 1e-6, "student gradient": error})
