"""What settings of vLLM are where nobody chose them: the device decides."""

from __future__ import annotations

import pytest

from gadcore.config.rollout import VLLMRollout
from gadcore.plan.memory import Case
from tests.support.plan_cases import preset_case, round_case

GIB = 2**30


@pytest.mark.parametrize(
    ("device", "memory", "name", "sequences"),
    [
        ("cpu", 500 * GIB, "some CPU", 256),
        ("cuda", 80 * GIB, "NVIDIA H100 80GB HBM3", 1024),
        ("cuda", 80 * GIB, "NVIDIA A100-SXM4-80GB", 256),
        ("cuda", 24 * GIB, "NVIDIA GeForce RTX 4090", 256),
        ("cuda", 180 * GIB, "NVIDIA B200", 1024),
    ],
)
def test_sequences_at_once(device: str, memory: int, name: str, sequences: int) -> None:
    assert VLLMRollout().sequences_at_once(device, memory, name) == sequences
    assert VLLMRollout(max_num_seqs=7).sequences_at_once(device, memory, name) == 7


def test_graphs_are_for_cuda() -> None:
    assert [VLLMRollout().eager(device) for device in ("cpu", "cuda")] == [True, False]
    for chosen in (True, False):
        assert [VLLMRollout(enforce_eager=chosen).eager(device) for device in ("cpu", "cuda")] == [chosen] * 2


def test_the_planner_asks_the_same() -> None:
    def sequences(case: Case) -> int:
        return case.sequences_at_once

    assert sequences(preset_case("qwen2.5-3b", "h100-80gb-x1")) == 1024
    assert sequences(preset_case("qwen2.5-3b", "h100-80gb-x1", "--rollout.max_num_seqs", "64")) == 64
    assert sequences(round_case()) == 256
    assert sequences(preset_case("qwen2.5-3b", "h100-80gb-x1", "--rollout.engine", "hf")) == 8
