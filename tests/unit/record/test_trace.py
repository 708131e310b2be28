"""trace.json: it loads at any moment, and a resumed run goes on with it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gadcore.record.trace import TAIL_BYTES, Trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == kind]


def killed(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that was not closed, as Perfetto reads them: without the closing bracket."""
    return json.loads(path.read_text() + "]")


def test_spans_lie_on_named_tracks_in_microseconds_since_1970(path: Path) -> None:
    trace = Trace(path)
    start, now = time.perf_counter(), time.time()
    trace.span("rollout", "phases", start, start + 2.5)
    trace.span("student.optimizer", "copies", start + 1.0, start + 1.25, bytes=7)
    trace.close()
    events = json.loads(path.read_text())
    first, second = of_kind(events, "X")
    assert first["ts"] == pytest.approx(now * 1e6, abs=0.5e6)
    assert (first["dur"], first["args"]) == (2.5e6, {})
    assert second["ts"] - first["ts"] == pytest.approx(1e6, abs=1)
    assert (second["name"], second["dur"], second["args"]) == ("student.optimizer", 0.25e6, {"bytes": 7})
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [names[event["tid"]] for event in (first, second)] == ["phases", "copies"]
    assert len({event["pid"] for event in events}) == 1


def test_a_counter_has_its_values(path: Path) -> None:
    trace = Trace(path)
    trace.counter("machine", time.perf_counter(), {"rss_gib": 1.5, "cpu_load": 2.0})
    (event,) = of_kind(killed(path), "C")
    assert event["name"] == "machine" and event["args"] == {"rss_gib": 1.5, "cpu_load": 2.0}


def test_a_killed_run_leaves_every_event_that_it_wrote(path: Path) -> None:
    trace = Trace(path)
    for i in range(3):
        trace.span(f"step {i}", "steps", i, i + 1)
        assert [event["name"] for event in of_kind(killed(path), "X")] == [f"step {k}" for k in range(i + 1)]


@pytest.mark.parametrize("end", ["closed", "killed", "torn", "torn at its beginning"])
def test_a_resumed_run_goes_on_in_the_same_tracks(path: Path, end: str) -> None:
    trace = Trace(path)
    trace.span("rollout", "phases", 0.0, 1.0)
    trace.span("kept", "copies", 0.0, 1.0)
    expected = ["rollout", "kept", "later"]
    if end == "closed":
        trace.close()
    elif end == "torn":
        with path.open("a") as file:
            file.write(',\n{"name": "lost", "ph": "X", "ar')
    elif end == "torn at its beginning":
        path.write_text('[\n{"name": "proc')
        expected = ["later"]
    again = Trace(path)
    again.span("later", "copies", 2.0, 3.0)
    again.close()
    events = json.loads(path.read_text())
    spans = of_kind(events, "X")
    assert [event["name"] for event in spans] == expected
    assert len({event["tid"] for event in spans if event["name"] in ("kept", "later")}) == 1
    assert len({event["tid"] for event in spans}) == min(len(spans), 2)


def test_only_the_end_of_a_long_trace_is_read(path: Path) -> None:
    trace = Trace(path)
    for i in range(1000):
        trace.span("x" * 100, "phases", i, i + 1)
    assert path.stat().st_size > 2 * TAIL_BYTES
    with path.open("a") as file:
        file.write(',\n{"na')
    Trace(path).close()
    assert len(of_kind(json.loads(path.read_text()), "X")) == 1000


def test_what_comes_after_the_end_is_dropped(path: Path) -> None:
    trace = Trace(path)
    trace.close()
    before = path.read_text()
    trace.counter("machine", 1.0, {"rss_gib": 1.0})
    trace.close()
    assert path.read_text() == before


def test_threads_do_not_tear_each_others_events(path: Path) -> None:
    trace = Trace(path)

    def write(number: int) -> None:
        for i in range(200):
            trace.span("x" * 50, f"track {number}", i, i + 1)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    assert len(of_kind(json.loads(path.read_text()), "X")) == 800
