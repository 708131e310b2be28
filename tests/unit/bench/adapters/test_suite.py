"""The suite `adapters` on a tiny model: every side takes its turns, and says what is asked of it."""

from __future__ import annotations

import pytest

from tests.support.importable import make_bench_importable

make_bench_importable()
from bench.adapters import suite  # noqa: E402

PHASES = {"discriminator", "discriminator update", "reference", "student", "student update", "generate"}


def test_all_weights_beside_a_rank() -> None:
    pytest.importorskip("vllm")
    full, lora = suite.run(True, ranks=(4,))
    assert [suite.key(row) for row in (full, lora)] == [("all weights", 1), ("rank 4", 1)]
    assert full["sampling_of_plain"] == 1 and lora["sampling_of_plain"] > 0
    for row in (full, lora):
        assert row["seconds_by_phase"].keys() >= PHASES and row["peak_bytes_by_phase"].keys() >= PHASES
        assert row["seconds"] == pytest.approx(sum(row["seconds_by_phase"].values()))
        assert row["peak_bytes"] >= row["loaded_bytes"] > 0
