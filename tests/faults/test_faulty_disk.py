"""A run that dies, or finds the disk full, at any call that changes its folder, goes on to the same result.

Every call takes an hour: GADCORE_FAULT_STRIDE=1 python -m pytest tests/faults/test_faulty_disk.py --timeout 0
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import faulty_disk

STRIDE = os.environ.get("GADCORE_FAULT_STRIDE")
PLANS = ["kill:50:120", "half:131:999", "full:90:120"]


@pytest.mark.slow
@pytest.mark.skipif(faulty_disk.compiler() is None, reason="there is no C compiler")
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    plans = [f"{action}:1:{STRIDE}" for action in ("kill", "half", "full")] if STRIDE else PLANS
    *wrong, counts = faulty_disk.start(tmp_path / "runs", plans)
    assert not wrong
    assert counts["calls"] > 200 and counts["tried"] >= 4
