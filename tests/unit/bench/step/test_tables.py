"""docs/measured/step.md says what the results say, and nothing of a failed gate."""

from __future__ import annotations

from bench.step import comparison, tables
from tests.support.bench_steps import answer, row


def test_no_speed_up_is_shown_behind_a_failed_gate() -> None:
    good, bad = row(), row(gate="fail")
    assert "x6.00" in comparison.line(good)
    assert "x6" not in comparison.line(bad) and "FAILED" in comparison.line(bad)
    shown = tables.document(lambda suite: [good])
    assert "6.00" in shown and "0.50" in shown and "75%" in shown
    profiled = good | {"profile": {"seconds": 8.0, "operations": [["aten::mm", 6.0, 12], ["other operations", 1.0, 3]]}}
    shown = tables.document(lambda suite: [profiled])
    assert "| `aten::mm` | 6.00 | 75.0% | 12 |" in shown and "| outside of operations | 1.00 | 12.5% |  |" in shown
    hidden = tables.document(lambda suite: [bad])
    assert "gate FAILED" in hidden and "6.00" not in hidden and "75%" not in hidden


def test_the_schedule_alone_stands_beside_ours_and_a_dash_where_it_was_not_measured() -> None:
    alone = comparison.compare(
        [answer(ours=True, generate=6.0, policy=8.0, optimizer=2.0)] * 3,
        [answer(ours=False, gib=4.0, generate=30.0, policy=18.0)] * 3,
        1,
    )
    config = {"lengths": "forced", "model": "random", "rest_s": 20}
    text = tables.document(lambda suite: [row(schedule_alone=alone, config=config)])
    assert "| cpu | TRL | 8.00 | 48.00 | 6.00 | 3.00 | 3.00 | 2.25 | 0%, 0% | 20 |" in text
    assert "| cpu | TRL | 16.00 | 48.00 | 3.00 | 1.80 | 1.12 | 0%, 0% | 1024 | 0.25 |" in text
    assert "| schedule alone | 6.00 | 8.00 | 2.00 |" in text
    assert "the schedule alone x3.00" in comparison.line(row(schedule_alone=alone))
    for old in (row(), row(schedule_alone=None)):
        text = tables.document(lambda suite, old=old: [old])
        assert "| cpu | TRL | 8.00 | 48.00 | 6.00 | - | 3.00 | 2.25 | 0%, 0% | - |" in text
        assert "## The schedule alone\n\nNot measured." in text
        assert "schedule alone x" not in comparison.line(old)


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()


def test_document_says_where_nothing_was_run() -> None:
    assert "Not run" in tables.document(lambda suite: [])
