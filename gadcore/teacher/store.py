"""Requests, their keys, and the file of replies: JSONL that only grows, one flushed line a reply."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gadcore.errors import UserError
from gadcore.files import LOCK, held
from gadcore.teacher.reply import Reply


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to be answered.

    messages: ({"role": .., "content": ..}, ..), the last one the user's.
    parameters: the other fields of the request's body, for example {"temperature": 0, "max_completion_tokens": 64}.
    """

    messages: Sequence[Mapping[str, str]]
    parameters: Mapping[str, Any]

    def key(self, model: str, address: str = "") -> str:
        """SHA-256 of the canonical JSON of (messages, model, parameters, address), in hexadecimal.

        address: of the server; "": without one, as versions of gadcore before there were addresses have written it.
        """
        content = {"messages": [dict(m) for m in self.messages], "model": model, "parameters": dict(self.parameters)}
        content |= {"address": address} if address else {}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def prompt_estimate(self) -> int:
        """Tokens of the prompt, guessed from its bytes before anybody has counted them."""
        return sum(estimate_tokens(m["content"]) + 8 for m in self.messages)

    def response_limit(self) -> int:
        """Tokens that the response may have; 0 where the request sets no limit."""
        return int(self.parameters.get("max_completion_tokens") or self.parameters.get("max_tokens") or 0)


# Bytes. The longest tokens of the vocabularies in use are runs of spaces.
_LONGEST_TOKEN = 128


def estimate_tokens(text: str) -> int:
    """Rather too many than too few: English has about 4 bytes a token, Chinese about 3 and more."""
    return len(text.encode(errors="replace")) // 3 + 1


@dataclass(frozen=True)
class Spent:
    """Answered requests, prompt and response tokens; uncounted: answers whose tokens the server did not count."""

    requests: int = 0
    prompt: int = 0
    response: int = 0
    uncounted: int = 0

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        mine, others = astuple(self), astuple(other)
        return Spent(*(a + sign * b for a, b in zip(mine, others, strict=True)))

    def minus(self, other: Spent) -> Spent:
        return self.plus(other, -1)

    @property
    def tokens(self) -> int:
        return self.prompt + self.response

    @classmethod
    def of(cls, request: ChatRequest, usage: Mapping[str, Any] | None, text: str = "") -> Spent:
        """One answer's; tokens are estimated where the server has not counted them, or fewer than there can be.
        usage: as of Reply."""
        counted = usage or {}
        asked = sum(len(message["content"].encode(errors="replace")) for message in request.messages)
        prompt = _credible(counted.get("prompt_tokens"), asked)
        response = _credible(counted.get("completion_tokens"), len(text.encode(errors="replace")))
        return cls(
            1,
            request.prompt_estimate() if prompt is None else prompt,
            estimate_tokens(text) if response is None else response,
            int(prompt is None or response is None),
        )


def _credible(count: int | None, size: int) -> int | None:
    """A count of tokens, None where it is none of so many bytes: a server that counts nothing spends no budget."""
    return count if count is not None and count * _LONGEST_TOKEN >= size else None


@dataclass(frozen=True)
class Line:
    """A line of the file, as ReplyStore describes it: reply is None in one that failed. address: None in old ones."""

    key: str
    model: str
    messages: list[dict[str, str]]
    parameters: dict[str, Any]
    spent: Spent
    received: str
    address: str | None = None
    reply: Reply | None = None
    seconds: float | None = None
    failed: str | None = None


_LINE = TypeAdapter(Line)


class ReplyStore:
    """The file of replies, by key. A context manager; one process at a time may hold it.

    A line is {"key", "model", "address", "messages", "parameters", "spent", "received", "reply", "seconds"}; one with
    "failed" in place of the last two is an attempt that got no usable answer, kept for its reason and for what it cost.
    Of several replies to one request the last one counts. Only offsets are kept in memory.

    address: of the server that is asked now, part of every key: the same name may be another model elsewhere. Lines
    from before there were addresses count as of this one; `adopted` is how many of them there are.

    Raises UserError for a file that is held by another process, cannot be written, or has a broken line that is not
    its last. A last line that a killed process left half written is cut off; `repaired` says so.
    """

    def __init__(self, path: Path, address: str = "") -> None:
        self.path, self.address = path, address
        self.repaired: str | None = None
        self.adopted = 0
        self.spent = Spent()
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> ReplyStore:
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.path.with_name(f"{LOCK}-{self.path.name}"), str(self.path)))
                self._writer = stack.enter_context(self.path.open("ab", buffering=0))
            except OSError as error:
                raise UserError(
                    f"{error.filename} cannot be written: {error.strerror}: choose another folder"
                ) from None
            self._reader = stack.enter_context(self.path.open("rb"))
            self._read()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def key(self, request: ChatRequest, model: str) -> str:
        """Of the request to the server of this store."""
        return request.key(model, self.address)

    def notes(self) -> list[str]:
        """What the user has to know about the file as it was found."""
        notes = [self.repaired] if self.repaired else []
        if self.adopted:
            notes.append(
                f"{self.adopted} lines of {self.path} were written before addresses were kept: they count as "
                f"{self.address}'s"
            )
        return notes

    def get(self, key: str) -> Reply | None:
        row = self.row(key)
        return None if row is None else row.reply

    def row(self, key: str) -> Line | None:
        """The whole line of an answered request."""
        if key not in self._offsets:
            return None
        self._reader.seek(self._offsets[key])
        return _LINE.validate_json(self._reader.readline(), strict=True)

    def add(self, request: ChatRequest, model: str, reply: Reply, spent: Spent, seconds: float) -> None:
        row = self._row(request, model, spent) | {"reply": asdict(reply), "seconds": round(seconds, 3)}
        self._offsets[row["key"]] = self._append(row)
        self.spent = self.spent.plus(spent)

    def add_failure(self, request: ChatRequest, model: str, reason: str, spent: Spent) -> None:
        self._append(self._row(request, model, spent) | {"failed": reason})
        self.spent = self.spent.plus(spent)

    def _row(self, request: ChatRequest, model: str, spent: Spent) -> dict[str, Any]:
        return {
            "key": self.key(request, model),
            "model": model,
            "address": self.address,
            "messages": [dict(message) for message in request.messages],
            "parameters": dict(request.parameters),
            "spent": asdict(spent),
            "received": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _append(self, row: dict[str, Any]) -> int:
        """Returns the line's offset; the line is on disk then."""
        offset = self._writer.seek(0, os.SEEK_END)
        line = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        try:
            while line:
                line = line[self._writer.write(line) :]
            os.fsync(self._writer.fileno())
        except OSError as error:
            self._writer.truncate(offset)
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}: mend that and give the same command again; "
                "the replies before this one are kept"
            ) from None
        return offset

    def _read(self) -> None:
        offset = 0
        for number, line in enumerate(self._reader, 1):
            if not line.endswith(b"\n"):
                self._writer.truncate(offset)
                self.repaired = (
                    f"the last line of {self.path} was only half written ({len(line)} bytes): cut off, its request "
                    "will be asked again"
                )
                break
            self._index(line, offset, number)
            offset += len(line)

    def _index(self, line: bytes, offset: int, number: int) -> None:
        try:
            row = _LINE.validate_json(line, strict=True)
            if min(astuple(row.spent)) < 0 or (row.reply is None) == (row.failed is None):
                raise ValueError("no amount, or not one of reply and failed")
        except (ValueError, RecursionError):
            raise UserError(
                f"{self.path}:{number} is no line of replies: restore the file, or remove this line and have its "
                "request asked again"
            ) from None
        if row.reply is not None:
            key = row.key
            if row.address is None and self.address:
                key = self.key(ChatRequest(row.messages, row.parameters), row.model)
                self.adopted += 1
            self._offsets[key] = offset
        self.spent = self.spent.plus(row.spent)
