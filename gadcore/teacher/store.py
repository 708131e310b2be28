"""Requests, their keys, and the file of replies: JSONL that only grows, one flushed line a reply."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gadcore.errors import UserError

Outcome = Literal["answered", "cut", "refused", "empty", "other"]


class Unusable(Exception):
    """A body with status 200 that holds no answer. usage: what was billed for it all the same, where it says so."""

    def __init__(self, reason: str, usage: Any = None) -> None:
        super().__init__(reason)
        self.usage = usage if isinstance(usage, dict) else None


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to be answered.

    messages: ({"role": .., "content": ..}, ..), the last one the user's.
    parameters: the other fields of the request's body, for example {"temperature": 0, "max_completion_tokens": 64}.
    """

    messages: Sequence[Mapping[str, str]]
    parameters: Mapping[str, Any]

    def key(self, model: str) -> str:
        """SHA-256 of the canonical JSON of (messages, model, parameters), in hexadecimal."""
        content = {"messages": [dict(m) for m in self.messages], "model": model, "parameters": dict(self.parameters)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def prompt_estimate(self) -> int:
        """Tokens of the prompt, guessed from its bytes before anybody has counted them."""
        return sum(estimate_tokens(m["content"]) + 8 for m in self.messages)

    def response_limit(self) -> int:
        """Tokens that the response may have; 0 where the request sets no limit."""
        return int(self.parameters.get("max_completion_tokens") or self.parameters.get("max_tokens") or 0)


def estimate_tokens(text: str) -> int:
    """Rather too many than too few: English has about 4 bytes a token, Chinese about 3 and more."""
    return len(text.encode(errors="replace")) // 3 + 1


@dataclass(frozen=True)
class Reply:
    """What the endpoint said.

    text: "" where there is none. refusal: the refusal's own text, where the server tells it apart.
    usage: as the server counted, or None. model: as the server calls itself.
    """

    text: str
    finish_reason: str | None
    refusal: str | None = None
    usage: Mapping[str, Any] | None = None
    model: str | None = None
    id: str | None = None

    @property
    def outcome(self) -> Outcome:
        """answered: ended by itself. cut: by the length limit. other: any other reason to end."""
        if self.refusal or self.finish_reason == "content_filter":
            return "refused"
        if self.finish_reason == "length":
            return "cut"
        if not self.text.strip():
            return "empty"
        return "answered" if self.finish_reason == "stop" else "other"

    @classmethod
    def parse(cls, body: bytes) -> Reply:
        """Reads the body of a chat completion; raises Unusable where it holds no answer."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise Unusable(f"the answer is not JSON: {body[:80].decode(errors='replace')!r}") from None
        if not isinstance(data, dict):
            raise Unusable(f"the answer is JSON, but no object: {str(data)[:80]!r}")
        usage = data.get("usage")
        if data.get("error"):
            raise Unusable(f"the answer holds an error: {str(data['error'])[:200]!r}", usage)
        choices = data.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unusable("the answer has no choices", usage)
        message, reason = choices[0].get("message"), choices[0].get("finish_reason")
        if not isinstance(message, dict):
            raise Unusable("the answer has no message", usage)
        text, refusal = message.get("content"), message.get("refusal")
        if not isinstance(refusal, str | None) or not isinstance(reason, str | None):
            raise Unusable("the answer's refusal or finish_reason is not text", usage)
        if text is None and (refusal or reason in ("content_filter", "length")):
            text = ""
        if not isinstance(text, str):
            raise Unusable("the answer's message has no content", usage)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unusable("the answer holds half of a surrogate pair, which is no valid text", usage) from None
        usage = usage if isinstance(usage, dict) else None
        return cls(text, reason, refusal, usage, _text(data.get("model")), _text(data.get("id")))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


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
        """One answer's; tokens are estimated where the server has not counted them."""
        usage = usage or {}
        prompt, response = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(prompt, int) and isinstance(response, int):
            return cls(1, prompt, response)
        return cls(1, request.prompt_estimate(), estimate_tokens(text), 1)


class ReplyStore:
    """The file of replies, by key. A context manager; one process at a time may hold it.

    A line is {"key", "model", "messages", "parameters", "spent", "received", "reply", "seconds"}; one with "failed" in
    place of the last two is an attempt that got no usable answer, kept for its reason and for what it cost.
    Only offsets are kept in memory.

    Raises UserError for a file that is held by another process, cannot be written, or has a broken line that is not
    its last. A last line that a killed process left half written is cut off; `repaired` says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repaired: str | None = None
        self.spent = Spent()
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> ReplyStore:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be written: {error.strerror}: choose another folder") from None
        self._reader = self.path.open("rb")
        try:
            fcntl.flock(self._writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.__exit__()
            raise UserError(f"another process is writing to {self.path}: wait for it or stop it") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._writer.close()

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> Reply | None:
        row = self.row(key)
        return None if row is None else Reply(**row["reply"])

    def row(self, key: str) -> dict[str, Any] | None:
        """The whole line of an answered request."""
        if key not in self._offsets:
            return None
        self._reader.seek(self._offsets[key])
        row: dict[str, Any] = json.loads(self._reader.readline())
        return row

    def add(self, request: ChatRequest, model: str, reply: Reply, spent: Spent, seconds: float) -> None:
        row = self._row(request, model, spent) | {"reply": asdict(reply), "seconds": round(seconds, 3)}
        self._offsets[row["key"]] = self._append(row)
        self.spent = self.spent.plus(spent)

    def add_failure(self, request: ChatRequest, model: str, reason: str, spent: Spent) -> None:
        self._append(self._row(request, model, spent) | {"failed": reason})
        self.spent = self.spent.plus(spent)

    @staticmethod
    def _row(request: ChatRequest, model: str, spent: Spent) -> dict[str, Any]:
        return {
            "key": request.key(model),
            "model": model,
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
            row = json.loads(line)
            spent = Spent(**row["spent"])
            if "failed" not in row:
                Reply(**row["reply"])
                self._offsets[row["key"]] = offset
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path}:{number} is no line of replies: restore the file, or remove this line and have its "
                "request asked again"
            ) from None
        self.spent = self.spent.plus(spent)
