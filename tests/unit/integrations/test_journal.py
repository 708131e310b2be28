"""The journal alone: what is there after a transaction, whose past a request belongs to, what may be forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.integrations.service.journal import Journal


def update(journal: Journal, *names: str) -> int:
    version = journal.begin([(name, f"digest {name}", [{"id": name}]) for name in names])
    journal.end(version, {name: {"version": version} for name in names})
    return version


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "journal.sqlite")
    made.first()
    return made


def test_what_was_begun_and_what_was_answered_outlast_the_process(journal: Journal) -> None:
    assert update(journal, "a", "b") == 1
    assert journal.begin([("c", "x", [{"id": "c"}])]) == 2
    again = Journal(journal.path)
    assert again.newest == 2
    found = again.find("b")
    assert found is not None and (found.state, found.version, found.answer) == ("done", 1, {"version": 1})
    (begun,) = again.of_version(2)
    assert (begun.id, begun.state, begun.groups, begun.attempts) == ("c", "begun", [{"id": "c"}], 1)
    assert [entry.id for entry in again.of_version(1)] == ["a", "b"]
    assert again.attempt(2) == 2
    assert again.find("nobody") is None


def test_a_failed_update_never_was(journal: Journal) -> None:
    update(journal, "a")
    version = journal.begin([("b", "x", [{}])])
    journal.fail(version, {"code": "c", "message": "m"})
    assert journal.newest == 1 and journal.of_version(2) == []
    found = journal.find("b")
    assert found is not None and (found.state, found.answer["message"]) == ("failed", "m")
    assert update(journal, "c") == 2


def test_a_restore_makes_what_came_after_it_as_if_it_had_never_been(journal: Journal) -> None:
    for name in "abc":
        update(journal, name)
    journal.restored(4, 1)
    journal.restored(4, 1)
    assert journal.newest == 4
    assert journal.find("a") is not None and journal.find("b") is None and journal.find("c") is None
    assert update(journal, "b") == 5
    found = Journal(journal.path).find("b")
    assert found is not None and found.version == 5
    assert [journal.is_ancestor(version) for version in range(6)] == [True, True, False, False, True, True]
    assert journal.since([0]) == (0, [1, 5])
    assert journal.since([0, 1, 3]) == (1, [5])
    assert journal.since([4]) == (4, [5])
    # To a version that had been left behind: its past is the past again.
    journal.restored(6, 3)
    assert journal.find("c") is not None and journal.find("b") is not None and journal.find("b").version == 2
    assert journal.since([0]) == (0, [1, 2, 3])
    with pytest.raises(UserError, match="no checkpoint that version 6 can be made of"):
        journal.since([5, 4])


def test_what_no_restart_needs_is_forgotten(journal: Journal) -> None:
    for number in range(30):
        update(journal, f"r{number}")
    journal.only_scored("frozen", "x", {"version": 30})
    journal.forget(texts_until=28, keep_answers=5)
    assert journal.of_version(28) == [] and len(journal.of_version(29)) == 1
    assert [number for number in range(30) if journal.find(f"r{number}")] == [26, 27, 28, 29]
    assert journal.find("frozen") is not None


def test_a_file_that_is_no_journal_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no journal at all, but some text of a kilobyte" * 30)
    with pytest.raises(UserError, match="cannot be used as a journal"):
        Journal(tmp_path / "journal.sqlite")
    other = Journal(tmp_path / "other.sqlite")
    other.set_facts({"format": 99})
    with pytest.raises(UserError, match="has format 99"):
        Journal(tmp_path / "other.sqlite")
