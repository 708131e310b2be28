"""`python -m bench soda --quick`: TRL's own trainer agrees with the literal DPO, and so does ours."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.runs import run

pytest.importorskip("trl")


def test_both_sides_pass_the_gate(tmp_path) -> None:
    done = run(["--quick", "--out", "rows.json"], tmp_path, command=[sys.executable, "-m", "bench", "soda"])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["gate"] == "pass" and row["pairs"] == 4
    assert max(row[side]["gradient_error"] for side in ("ours", "theirs")) < 1e-5
    assert row["ratio"] > 0 and row["ours"]["tokens_per_second"] > 0
