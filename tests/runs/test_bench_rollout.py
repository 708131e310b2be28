"""The suite `rollout` on a tiny model: every side samples what was asked for."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import main


def test_quick(tmp_path) -> None:
    pytest.importorskip("vllm")
    out = tmp_path / "rollout.json"
    assert main(["rollout", "--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["opponent"] for row in rows] == ["vllm eager", "hf"]
    for row in rows:
        assert row["shape"]["rows"] == 8 and row["ratio"] > 0
        assert len(row["ours"]["runs"]) == len(row["theirs"]["runs"]) == 2
