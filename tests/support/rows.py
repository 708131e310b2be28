"""Records of a trainer that stay in memory."""

from __future__ import annotations

from gadcore.train.records import Records


class Rows(Records):
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.messages: list[str] = []

    def step(self, place, values) -> None:
        self.rows.append({**place, **values})

    def message(self, text) -> None:
        self.messages.append(text)
