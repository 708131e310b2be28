"""docs/measured/rollout.md says what the results say."""

from __future__ import annotations

from bench.rollout import tables


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()


def test_document_says_where_nothing_was_run() -> None:
    assert "Not run" in tables.document(lambda suite: [])
