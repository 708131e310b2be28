"""Rows of results and the facts beside them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from bench import record
from bench.record import Result, Timing
from tests.support.bench_rows import result, timing


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.json"
    rows = record.stamped("kernels", [record.as_row(result())])
    record.write(path, rows)
    (again,) = (Result.from_json(row) for row in record.read(path))
    assert (again.ours, again.theirs, again.ratio) == (result().ours, result().theirs, 2.0)
    assert again.commit and again.machine["cores"] >= 1 and "torch" in again.versions
    assert record.read(tmp_path / "none.json") == []


def test_a_file_that_is_no_list_of_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="list of objects"):
        record.read(tmp_path / "x.json")


def test_timing_keeps_every_run_and_its_spread() -> None:
    assert timing([1.0, 4.0, 2.0]) == Timing([1.0, 4.0, 2.0], 2.0, 1.0, 4.0, 1.5, 2**20, {"loss": 1e-7}, None)
    assert Timing.of([1.0, 3.0], peak_bytes=None, error={}, first_s=12.0).compile_s == 10.0


def test_facts_name_neither_the_machine_nor_a_path() -> None:
    facts = json.dumps([record.machine(), record.versions(), record.commit()])
    assert platform.node() not in facts or len(platform.node()) < 3
    assert str(Path.home()) not in facts and str(record.ROOT) not in facts


def test_what_a_suite_says_itself_is_kept() -> None:
    (row,) = record.stamped("aot", [{"kernel": "k", "machine": {"target": "sm_90"}, "commit": ""}])
    assert row["machine"] == {"target": "sm_90"} and row["commit"] == record.commit() and row["suite"] == "aot"
