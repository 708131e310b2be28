"""Stages of `python -m bench gpu` as on a GPU: Triton's kernels, CUDA's events, the device's memory."""

from __future__ import annotations

from bench.gpu import attention
from bench.gpu.place import Place
from bench.offline.cuda_standin import gpu


def test_attention_beside_its_opponents() -> None:
    with gpu(total=1 << 30):
        place = Place.find(rehearse=False, quick=True)
        assert place.on_gpu and place.tiny and place.memory == 1 << 30
        rows = {row["case"].partition(",")[0]: row for row in attention.rows(place)}
        assert place.facts["gpu_memory_gib"] == 1.0
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "not installed"]
    # bfloat16, and Triton's kernel for ours.
    assert rows["ours"]["gate"] == rows["SDPA"]["gate"] == "pass" and 1e-4 < rows["ours"]["error"] < 2e-2
