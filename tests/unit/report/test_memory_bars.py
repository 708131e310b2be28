"""The memory bars of the report: to scale, one per state, never added up, and readable without seeing them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gadcore.report.files import load
from gadcore.report.memory_bars import memory_of
from gadcore.report.page import write_report

GIB = 2**30
STATES = {
    "rollout": {"student.parameters": 1 * GIB, "engine.kv_cache": 2 * GIB, "process": 1 * GIB},
    "student": {"student.optimizer": 2 * GIB, "student.parameters": 1 * GIB, "process": 1 * GIB},
}


def row(step: int, **more: float) -> dict[str, Any]:
    return {"stage": "gad", "step": step, "stage_step": step, "stage_steps": 2} | {
        f"memory/{key}": value for key, value in more.items()
    }


ROWS = [
    row(1, rollout_held=4 * GIB, rollout_peak=4.5 * GIB, student_held=4 * GIB, student_peak=7 * GIB),
    row(2, rollout_held=4 * GIB, rollout_peak=5 * GIB, student_held=4 * GIB, student_peak=6 * GIB),
]


def folder(path: Path, rows: list[dict[str, Any]], memory: dict[str, Any] | None) -> Path:
    path.mkdir()
    (path / "config.toml").write_text("")
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if memory is not None:
        (path / "summary.json").write_text(json.dumps({"memory": memory}))
    return path


def memory(limit: int | None = 7 * GIB, states: dict[str, dict[str, int]] = STATES) -> dict[str, Any]:
    return {"process_bytes": 1 * GIB, "limit_bytes": limit, "states": states}


def part(path: Path, rows: list[dict[str, Any]] = ROWS, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    found = memory_of(load(folder(path / "run", rows, recorded)))
    assert found is not None
    return found


def bars(html: str) -> list[tuple[str, float, float]]:
    """(title, left, width) of every holder, in percent of the axis."""
    found = re.findall(r'<rect class="holder" x="([\d.]+)%" width="([\d.]+)%".*?<title>(.*?)</title>', html)
    return [(title, float(x), float(width)) for x, width, title in found]


def test_bars_begin_at_zero_in_every_state_and_are_to_scale(tmp_path: Path) -> None:
    found = part(tmp_path, recorded=memory())
    # The axis ends at 8 GiB: a GiB is 12.5 %.
    assert bars(found["html"]) == [
        ("rollout, process: 1.00 GiB", 0.0, 12.5),
        ("rollout, student.parameters: 1.00 GiB", 12.5, 12.5),
        ("rollout, engine.kv_cache: 2.00 GiB", 25.0, 25.0),
        ("student, process: 1.00 GiB", 0.0, 12.5),
        ("student, student.parameters: 1.00 GiB", 12.5, 12.5),
        ("student, student.optimizer: 2.00 GiB", 25.0, 25.0),
    ]
    peaks = re.findall(r'<line class="peak" x1="([\d.]+)%".*?<title>(.*?)</title>', found["html"])
    assert peaks == [("62.50", "rollout, peak resident: 5.00 GiB"), ("87.50", "student, peak resident: 7.00 GiB")]
    assert re.findall(r'<line class="limit" x1="([\d.]+)%"', found["html"]) == ["87.50"]


def test_the_table_holds_what_the_bars_show(tmp_path: Path) -> None:
    found = part(tmp_path, recorded=memory())
    assert found["states"] == ["rollout", "student"] and found["unit"] == "GiB"
    assert [(r["number"], ".".join(r["label"]), r["values"]) for r in found["rows"]] == [
        (1, "process", ["1.00", "1.00"]),
        (2, "student.parameters", ["1.00", "1.00"]),
        (3, "student.optimizer", ["–", "2.00"]),
        (4, "engine.kv_cache", ["2.00", "–"]),
    ]
    assert (found["held"], found["peaks"]) == (["4.00", "4.00"], ["5.00", "7.00"])
    assert found["notes"] == ["The limit is 7.00 GiB."]


def test_the_bars_in_words(tmp_path: Path) -> None:
    (desc,) = re.findall(r'<desc id="memory-desc">(.*?)</desc>', part(tmp_path, recorded=memory())["html"])
    assert "student: 4.00 GiB held (student.optimizer 2.00, student.parameters 1.00, process 1.00)" in desc
    assert "peak resident 7.00." in desc


@pytest.mark.parametrize(("limit", "line", "note"), [(14, True, ""), (15, False, "beyond the right edge")])
def test_a_limit_far_out_is_told_and_not_drawn(tmp_path: Path, limit: int, line: bool, note: str) -> None:
    found = part(tmp_path, recorded=memory(limit * GIB))
    assert ('class="limit"' in found["html"]) == line
    assert f"The limit is {limit}.00 GiB." in found["notes"][0] and note in found["notes"][0]


def test_without_a_limit_none_is_told(tmp_path: Path) -> None:
    found = part(tmp_path, recorded=memory(None))
    assert 'class="limit"' not in found["html"] and found["notes"] == []


def test_a_run_that_goes_on_has_bars_without_holders(tmp_path: Path) -> None:
    found = part(tmp_path)
    assert [title for title, _, _ in bars(found["html"])] == [
        "rollout, all holders: 4.00 GiB",
        "student, all holders: 4.00 GiB",
    ]
    assert "Who holds what is in summary.json" in found["notes"][0]


def test_the_process_is_told_where_no_state_counts_it(tmp_path: Path) -> None:
    states = {"rollout": {"engine.kv_cache": 2 * GIB}}
    found = part(tmp_path, [], memory(None, states))
    assert found["notes"] == ["The process itself, its libraries included, takes 1.00 GiB more."]
    assert found["peaks"] == [] and 'class="peak"' not in found["html"]


def test_small_models_are_told_in_mib(tmp_path: Path) -> None:
    states = {"rollout": {"engine.kv_cache": 3 * 2**20, "empty": 0}}
    found = part(tmp_path, [], memory(None, states))
    assert (found["unit"], found["held"]) == ("MiB", ["3.00"])
    assert len(found["rows"]) == 1


def test_a_run_that_recorded_nothing_has_no_part(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [row(1)], None)
    assert memory_of(load(run)) is None
    assert 'id="memory"' not in write_report(run).read_text()


def test_the_page_has_one_part_on_memory_and_text_from_files_stays_text(tmp_path: Path) -> None:
    states = STATES | {"<b>state": {"<i>holder": 1 * GIB}}
    html = write_report(folder(tmp_path / "run", ROWS, memory(states=states))).read_text()
    assert html.count('<details class="part print" id="memory">') == 1 and html.count('href="#memory"') == 1
    assert "<b>" not in html and "<i>" not in html
    assert "&lt;b&gt;state, &lt;i&gt;holder: 1.00 GiB" in html
    assert "student.<wbr>optimizer" in html and "held, all of them" in html
