"""docs/measured/adapters.md."""

from __future__ import annotations

from typing import Any

from bench.adapters import tables


def row(case: str, threads: int, factor: float) -> dict[str, Any]:
    seconds = {"other": 0.01, "generate": 4.0 * factor, "student": 6.0 * factor}
    return {
        "case": case,
        "threads": threads,
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "peak_bytes": 2**30 * factor,
        "peak_bytes_by_phase": {"generate": 2**30 * factor, "student": 2**29 * factor},
        "loaded_bytes": 2**28,
        "tokens_per_s": 200 / factor,
        "sampling_of_plain": 1 / factor,
    }


def test_the_document_has_a_table_a_thread_count_without_what_takes_no_time() -> None:
    rows = [row("all weights", 2, 1.0), row("rank 16", 2, 0.8), row("all weights", 1, 2.0)]
    text = tables.document(lambda name: rows)
    assert text.index("## At 1 thread\n") < text.index("## At 2 threads\n")
    assert "| side | step s | generate s | student s | tokens/s | sampling beside all weights |" in text
    assert "| rank 16 | 8.0 | 3.20 | 4.80 | 250 | 1.25 |" in text
    assert "| rank 16 | 819 | 256 | 819 | 410 |" in text


def test_without_results_it_says_so() -> None:
    assert "Not run" in tables.document(lambda name: [])


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()
