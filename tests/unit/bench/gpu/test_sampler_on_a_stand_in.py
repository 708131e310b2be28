"""The stages `eager` and `graphs` on stand-ins for a GPU and for vLLM: in what order vLLM is asked, and the rows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench.gpu import sampler
from bench.gpu.models import TINY, save_random
from bench.gpu.place import Place
from bench.offline.cuda_standin import gpu
from bench.offline.vllm_standin import installed
from gadcore.models.loading import load_causal_lm

TOTAL = 256 << 20
# Heads that no Triton kernel takes: its interpreter needs a process of its own.
SHAPE = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["eager", "graphs"])
def test_a_stage_with_vllm(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first model that transformers loads in a process must not meet the stand-in: its buffers would stay empty.
    cpu = torch.device("cpu")
    load_causal_lm(save_random(SHAPE, tmp_path / "first", cpu, torch.float32), "float32", cpu)
    monkeypatch.setattr(sampler, "TINY", SHAPE)
    monkeypatch.setattr(os, "environ", os.environ | {})
    with gpu(TOTAL, unit=16), installed():
        place = Place(torch.device("cuda", 0), "a stand-in", TOTAL, True)
        rows = {row["case"]: row for row in getattr(sampler, stage)(place)}
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert rows["sleep and wake"]["gate"] == "pass" and rows["sleep and wake"]["held_bytes"] > 1 << 20
    assert rows["8 sequences"]["tokens"] == 32
