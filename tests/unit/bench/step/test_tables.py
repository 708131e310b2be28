"""docs/measured/step.md says what the results say, and nothing of a failed gate."""

from __future__ import annotations

from bench.step import comparison, tables
from tests.support.bench_steps import row


def test_no_speed_up_is_shown_behind_a_failed_gate() -> None:
    good, bad = row(), row(gate="fail")
    assert "x6.00" in comparison.line(good)
    assert "x6" not in comparison.line(bad) and "FAILED" in comparison.line(bad)
    shown = tables.document(lambda suite: [good])
    assert "6.00" in shown and "0.50" in shown and "75%" in shown
    profiled = good | {"profile": {"cpu_s": 8.0, "operations": [["aten::mm", 6.0, 12], ["other operations", 1.0, 3]]}}
    shown = tables.document(lambda suite: [profiled])
    assert "| `aten::mm` | 6.00 | 75.0% | 12 |" in shown and "| outside of operations | 1.00 | 12.5% |  |" in shown
    hidden = tables.document(lambda suite: [bad])
    assert "gate FAILED" in hidden and "6.00" not in hidden and "75%" not in hidden


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()


def test_document_says_where_nothing_was_run() -> None:
    assert "Not run" in tables.document(lambda suite: [])
