"""The suite `rollout` on a tiny model: every side samples what was asked for."""

from __future__ import annotations

import json

import pytest

from bench import tables_rollout
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


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables_rollout.DOCUMENT.read_text(encoding="utf-8") == tables_rollout.document()


def test_document_says_where_nothing_was_run() -> None:
    assert "Not run" in tables_rollout.document(lambda suite: [])
