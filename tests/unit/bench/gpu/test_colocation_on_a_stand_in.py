"""The stage `colocation` on a stand-in for a GPU: what its gate sees."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import colocation
from bench.gpu.place import Place
from bench.offline.cuda_standin import gpu
from gadcore.memory.holdings import FOLLOWS
from gadcore.memory.ledger import Ledger

# Of holdings; a stand-in's allocator rounds as torch's does, by 20 MiB at most.
WHOLE, SLACK = 384 << 20, 24 << 20


def walk() -> dict[str, dict]:
    found: list[dict] = []
    with gpu(total=1 << 30):
        place = Place(torch.device("cuda", 0), "a stand-in", 1 << 30, True)
        row = colocation._walk(place, WHOLE, found)
    return {"all": row} | {row["case"]: row for row in found}


@pytest.mark.slow
def test_the_ledger_learns_what_a_state_worked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colocation, "SLACK", SLACK)
    rows = walk()
    assert rows.keys() == {"all", *FOLLOWS}
    assert {row["gate"] for row in rows.values()} == {"pass"}
    assert rows["all"]["moved_bytes"] > WHOLE and max(row["work"] for row in rows.values() if "work" in row) > 40 << 20


@pytest.mark.slow
def test_a_ledger_that_takes_the_allocators_cache_for_held_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As B3 was: what a state worked with is free, but not given back, by the time it is looked at."""

    def seen(ledger: Ledger, state: str, peak: int) -> None:
        ledger.work[state] = max(ledger.work.get(state, 0), peak - ledger.total)

    monkeypatch.setattr(colocation, "SLACK", SLACK)
    monkeypatch.setattr(Ledger, "seen", seen)
    gates = {case: row["gate"] for case, row in walk().items()}
    assert gates["all"] == "pass" and "fail" in gates.values()
