"""The journal: which request is part of which version of the discriminator, on the disk before anything is trained.

A version is a state of the weights; its number is never given again. An update is written in two transactions:

    begin   the update's requests with their texts and their order, under the next version
    end     their answers

so that a kill leaves one of three things. Before `begin`: nothing was trained, a repetition of the request trains.
Between them: the start of the service makes the update, from the texts that are here. After `end`: a repetition gets
the answer. The weights of a version that has no checkpoint are made again from an earlier one by the updates since.

A restore makes a new version whose parent is an old one. What is no ancestor of the newest version is as if it had
never been, and its request ids are free.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcore.errors import UserError

JSON = Any
FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY, parent INTEGER, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, groups TEXT, answer TEXT);
CREATE INDEX IF NOT EXISTS by_id ON requests (id);
CREATE INDEX IF NOT EXISTS by_version ON requests (version);
"""


@dataclass(frozen=True)
class Entry:
    """A request: state "begun", "done" or "failed". answer: what it got; of a failed one {"code", "message"}."""

    id: str
    version: int
    digest: str
    state: str
    attempts: int
    groups: list[JSON] | None
    answer: JSON


class Journal:
    """One thread writes; find() may be called by another one."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where the file is none of a journal, or of another format."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer, self._reader = (
                sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30) for _ in range(2)
            )
            for connection in (self._writer, self._reader):
                connection.execute("PRAGMA journal_mode = WAL")
                # Every commit is on the disk as it returns.
                connection.execute("PRAGMA synchronous = FULL")
            self._writer.executescript(_TABLES)
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"{path} cannot be used as a journal ({error}): choose another service.dir") from error
        self._reading = threading.Lock()
        found = self.fact("format")
        if found is None:
            self.set_facts({"format": FORMAT})
        elif found != FORMAT:
            raise UserError(f"{path} has format {found}, this version of gadcore reads format {FORMAT}")
        self._lineage = self._find_lineage()

    # Facts

    def fact(self, name: str) -> JSON:
        """What set_facts() said of a name; None for nothing."""
        row = self._writer.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_facts(self, facts: Mapping[str, JSON]) -> None:
        with self._transaction():
            for name, value in facts.items():
                self._writer.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # Versions

    @property
    def newest(self) -> int | None:
        """The version that the service is at; None before the first."""
        return self._lineage[0][1] if self._lineage else None

    def first(self) -> None:
        """Version 0: the weights that the service begins with."""
        self._add_version(0, None, "first")

    def restored(self, version: int, source: int) -> None:
        """A version of the weights of an old one. Nothing happens where it is there."""
        if self.newest is None or version > self.newest:
            self._add_version(version, source, "restore")

    def is_ancestor(self, version: int) -> bool:
        """Whether the newest version has grown out of this one."""
        return any(low <= version <= high for low, high in self._lineage)

    def since(self, bases: Sequence[int]) -> tuple[int, list[int]]:
        """(that of the versions `bases` which the newest has grown out of last, the updates since, in order).

        UserError where there is none.
        """
        updates: list[int] = []
        for low, high in self._lineage:
            base = max((version for version in bases if low <= version <= high), default=low - 1)
            rows = self._writer.execute(
                "SELECT version FROM versions WHERE version > ? AND version <= ? AND kind = 'update' ORDER BY version",
                (base, high),
            )
            updates = [version for (version,) in rows] + updates
            if base >= low:
                return base, updates
        raise UserError(
            f"{self.path.parent} has no checkpoint that version {self.newest} can be made of: its checkpoints were "
            "deleted or damaged; choose another service.dir to begin anew"
        )

    # Requests

    def find(self, request_id: str) -> Entry | None:
        """The request of that id which is part of the present weights' past."""
        with self._reading:
            rows = self._reader.execute(
                "SELECT id, version, digest, state, attempts, NULL, answer FROM requests WHERE id = ? "
                "ORDER BY place DESC", (request_id,),
            ).fetchall()  # fmt: skip
        return next((entry for entry in map(_entry, rows) if self.is_ancestor(entry.version)), None)

    def of_version(self, version: int) -> list[Entry]:
        """The requests of an update, in their order."""
        rows = self._writer.execute(
            "SELECT id, version, digest, state, attempts, groups, answer FROM requests "
            "WHERE version = ? AND state IN ('begun', 'done') AND groups IS NOT NULL ORDER BY place", (version,),
        )  # fmt: skip
        return [_entry(row) for row in rows]

    def begin(self, requests: Sequence[tuple[str, str, Sequence[JSON]]]) -> int:
        """Writes what the next version is trained on: (id, digest, groups) of every request. Returns the version."""
        parent = self.newest
        assert parent is not None
        version = parent + 1
        with self._transaction():
            self._writer.execute("INSERT INTO versions VALUES (?, ?, 'update')", (version, parent))
            self._insert([(i, version, d, "begun", 1, json.dumps(groups), None) for i, d, groups in requests])
        (low, _), *rest = self._lineage
        self._lineage = ((low, version), *rest)
        return version

    def end(self, version: int, answers: Mapping[str, JSON]) -> None:
        """The answers to the requests of an update, by their ids."""
        with self._transaction():
            for request_id, answer in answers.items():
                self._writer.execute(
                    "UPDATE requests SET state = 'done', answer = ? WHERE id = ? AND version = ?",
                    (json.dumps(answer, allow_nan=False), request_id, version),
                )

    def fail(self, version: int, told: JSON) -> None:
        """The update of the newest version was not made: its requests have failed, and the version never was."""
        (parent,) = self._writer.execute("SELECT parent FROM versions WHERE version = ?", (version,)).fetchone()
        with self._transaction():
            self._writer.execute("DELETE FROM versions WHERE version = ?", (version,))
            self._writer.execute(
                "UPDATE requests SET state = 'failed', answer = ?, groups = NULL, version = ? WHERE version = ? "
                "AND state = 'begun'", (json.dumps(told), parent, version),
            )  # fmt: skip
        self._lineage = self._find_lineage()

    def attempt(self, version: int) -> int:
        """Counts one more attempt at an update that was begun; returns how many there have been."""
        with self._transaction():
            self._writer.execute("UPDATE requests SET attempts = attempts + 1 WHERE version = ?", (version,))
        return max(entry.attempts for entry in self.of_version(version))

    def only_scored(self, request_id: str, digest: str, answer: JSON) -> None:
        """An answer that trained nothing, under the newest version."""
        with self._transaction():
            self._insert([(request_id, self.newest, digest, "done", 1, None, json.dumps(answer, allow_nan=False))])

    def forget(self, texts_until: int, keep_answers: int) -> None:
        """Drops the texts of versions up to one that has a checkpoint, and all but the newest requests."""
        with self._transaction():
            self._writer.execute(
                "UPDATE requests SET groups = NULL WHERE version <= ? AND groups NOTNULL", (texts_until,)
            )
            last = self._writer.execute("SELECT max(place) FROM requests").fetchone()[0] or 0
            self._writer.execute(
                "DELETE FROM requests WHERE place <= ? AND groups IS NULL AND state != 'begun'", (last - keep_answers,)
            )

    def close(self) -> None:
        with self._reading:
            self._reader.close()
        self._writer.close()

    # Inside

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            # A commit that failed, as on a full disk, may have ended it already.
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def _insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._writer.executemany(
            "INSERT INTO requests (id, version, digest, state, attempts, groups, answer) VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    def _add_version(self, version: int, parent: int | None, kind: str) -> None:
        with self._transaction():
            self._writer.execute("INSERT INTO versions VALUES (?, ?, ?)", (version, parent, kind))
        self._lineage = self._find_lineage()

    def _find_lineage(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of every run of versions that the newest has grown out of, the newest run first."""
        begins = dict(
            self._writer.execute("SELECT version, parent FROM versions WHERE parent IS NULL OR parent != version - 1")
        )
        (high,) = self._writer.execute("SELECT max(version) FROM versions").fetchone()
        runs: list[tuple[int, int]] = []
        while high is not None:
            low = max(version for version in begins if version <= high)
            runs.append((low, high))
            high = begins[low]
        return tuple(runs)


def _entry(row: Sequence[Any]) -> Entry:
    request_id, version, digest, state, attempts, groups, answer = row
    return Entry(
        request_id, version, digest, state, attempts,
        None if groups is None else json.loads(groups), None if answer is None else json.loads(answer),
    )  # fmt: skip
