"""What an endpoint said, read out of the body of its answer: the one place where a server's words become values.

A server is trusted with nothing. The key is masked first; a body is read however deep or odd it is; a field beside the
text that is not what it should be is left out and told (`Reply.told`), since the answer is paid for and must be kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gadcore.files import parse_json
from gadcore.teacher.secret import Secret
from gadcore.text import clean

Outcome = Literal["answered", "cut", "refused", "empty", "damaged", "other"]

DEPTH = 32  # of a body; what is nested deeper is not read
MOST_TOKENS = 10**9
NAME_CHARS = 200
REASON_CHARS = 300
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")
# Of an error: asking again does not help. Without what is no letter or digit, and without "error" at the end.
_LASTING = {
    "accountdeactivated", "authentication", "badrequest", "billinghardlimitreached", "billingnotactive",
    "contentpolicyviolation", "contextlengthexceeded", "forbidden", "insufficientquota", "invalidapikey",
    "invalidargument", "invalidrequest", "methodnotallowed", "modelnotfound", "notfound", "paymentrequired",
    "permission", "permissiondenied", "stringabovemaxlength", "unauthorized", "unprocessableentity",
    "unsupportedparameter", "unsupportedvalue",
}  # fmt: skip
# Wrong for one request, wrong for all: no key or a wrong one, no credit, no such model or address.
_HOPELESS = {
    "accountdeactivated", "authentication", "billinghardlimitreached", "billingnotactive", "insufficientquota",
    "invalidapikey", "methodnotallowed", "modelnotfound", "notfound", "paymentrequired", "unauthorized",
}  # fmt: skip
_PASSING_STATUS = (408, 409, 425, 429)
_HOPELESS_STATUS = (401, 402, 404, 405)


class Unusable(Exception):
    """An answer that holds no reply. The message is one line without the key.

    usage: what was billed for it all the same, where it says so. billed: whether it counts as an answer at all.
    lasting: asking again does not help. hopeless: nor does asking anything else. filtered: the prompt was refused.
    wait_s: how long the server asks to be left alone.
    """

    def __init__(
        self, reason: str, usage: Mapping[str, Any] | None = None, *, billed: bool = False, lasting: bool = False,
        hopeless: bool = False, filtered: bool = False, wait_s: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(clean(reason)[:REASON_CHARS])
        self.usage, self.billed, self.wait_s = usage, billed, wait_s
        self.lasting, self.hopeless, self.filtered = lasting or hopeless, hopeless, filtered


@dataclass(frozen=True)
class Reply:
    """What the endpoint said.

    text: "" where there is none. refusal: the refusal's own text, where the server tells it apart.
    usage: as the server counted, or None. model: as the server calls itself.
    told: what was odd about it, a sentence each. damaged: text or refusal held what is no text, which became U+FFFD.
    """

    text: str
    finish_reason: str | None
    refusal: str | None = None
    usage: Mapping[str, Any] | None = None
    model: str | None = None
    id: str | None = None
    told: tuple[str, ...] = ()
    damaged: bool = False

    @property
    def outcome(self) -> Outcome:
        """answered: ended by itself. cut: by the length limit. other: any other reason to end."""
        if self.damaged:
            return "damaged"
        if self.refusal or self.finish_reason == "content_filter":
            return "refused"
        if self.finish_reason == "length":
            return "cut"
        if not self.text.strip():
            return "empty"
        return "answered" if self.finish_reason == "stop" else "other"

    @classmethod
    def parse(cls, body: bytes, secret: Secret | None = None) -> Reply:
        """Reads the body of a chat completion; raises Unusable where it holds no answer."""
        reading = _Reading(secret or Secret(""))
        data = reading.json(body)
        if not isinstance(data, dict):
            raise Unusable(f"the answer is JSON, but no object: {_brief(data)!r}", billed=True)
        usage = reading.usage(data.get("usage"))
        if error := data.get("error"):
            raise _of_error(f"the answer holds an error: {_said(error)}", error, usage)
        choices = data.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unusable("the answer has no choices", usage, billed=True)
        message = choices[0].get("message")
        if not isinstance(message, dict):
            raise Unusable("the answer has no message", usage, billed=True)
        reason = reading.name("finish_reason", choices[0].get("finish_reason"))
        text, refusal = reading.content(message.get("content"), message.get("refusal"))
        if text is None and (refusal or reason in ("content_filter", "length", "tool_calls", "function_call")):
            text = ""
        if text is None:
            raise Unusable("the answer's message has no content", usage, billed=True)
        text, refusal = reading.valid("the text", text), reading.valid("the refusal", refusal or "") or None
        model, id = (reading.name(name, data.get(name)) for name in ("model", "id"))
        return cls(text, reason, refusal, usage, model, id, tuple(reading.told), reading.damaged)


def refused(status: int, body: bytes, secret: Secret, wait_s: float = 0.0) -> Unusable:
    """What to raise for an answer with a status other than 200."""
    reading = _Reading(secret)
    try:
        data = reading.json(body)
    except Unusable:
        data = secret.mask(body.decode(errors="replace"))
    error = data.get("error") or data if isinstance(data, dict) else data
    found = _of_error(f"HTTP {status}: {_said(error)}" + (f" (Retry-After: {wait_s:g})" if wait_s else ""), error, None)
    lasting = status not in _PASSING_STATUS and (status < 500 or status in (501, 505))
    return Unusable(
        str(found), lasting=lasting or (status == 429 and found.hopeless), filtered=found.filtered,
        hopeless=status in _HOPELESS_STATUS or (status in (400, 403, 429) and found.hopeless), wait_s=wait_s,
    )  # fmt: skip


class _Reading:
    """One body. told, damaged: as of Reply."""

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self.told: list[str] = []
        self.damaged = self._not_utf8 = False

    def json(self, body: bytes) -> Any:
        """The value, its key masked; raises Unusable. Whole numbers of more than 18 digits become floats."""
        try:
            text = body.decode("utf-8-sig")
        except UnicodeDecodeError:
            text, self._not_utf8 = body.decode("utf-8-sig", errors="replace"), True
            self.told.append("bytes that are not UTF-8 became U+FFFD")
        shallow = text
        if text.count("[") + text.count("{") > DEPTH and (shallow := _pruned(text)) != text:
            self.told.append(f"what is nested deeper than {DEPTH} was not read")
        try:
            value = parse_json(shallow)
        except ValueError:
            raise Unusable(f"the answer is not JSON: {_brief(self._secret.mask(text))!r}", billed=True) from None
        masked = self._secret.mask_all(value)
        if masked != value:
            self.told.append("it repeated the key, which became ***")
        return masked

    def usage(self, value: Any) -> dict[str, Any] | None:
        """The counts of tokens that are possible, and whatever else is small and valid."""
        if value is None:
            return None
        if not isinstance(value, dict):
            self.told.append("usage is no object: not kept")
            return None
        kept = {name: item for name, item in value.items() if self._small(f"usage.{name}", {name: item}, 4)}
        for name in ("prompt_tokens", "completion_tokens"):
            count = kept.get(name)
            if isinstance(count, float) and count.is_integer():
                kept[name] = count = int(count)
            if count is not None and not (type(count) is int and 0 <= count <= MOST_TOKENS):
                self.told.append(f"usage.{name} is no number of tokens: not kept")
                del kept[name]
        return kept

    def _small(self, name: str, value: Any, depth: int) -> bool:
        if isinstance(value, dict | list):
            items = list(value.values()) if isinstance(value, dict) else value
            names = list(value) if isinstance(value, dict) else []
            valid = depth > 0 and len(items) <= 100 and all(self._small("", item, depth - 1) for item in items + names)
        elif isinstance(value, str):
            valid = len(value) <= NAME_CHARS and not _HALF.search(value)
        else:
            valid = value is None or (math.isfinite(value) and abs(value) <= 10**15)
        if not valid and name:
            self.told.append(f"{_brief(_HALF.sub('?', name))} is no count: not kept")
        return valid

    def name(self, field: str, value: Any) -> str | None:
        """finish_reason, model or id."""
        if value is None:
            return None
        if not isinstance(value, str):
            self.told.append(f"{field} is no text: not kept")
            return None
        if _HALF.search(value):
            self.told.append(f"{field} holds half of a surrogate pair, which became U+FFFD")
        if len(value) > NAME_CHARS:
            self.told.append(f"{field} has {len(value)} characters: cut at {NAME_CHARS}")
        return _HALF.sub("\ufffd", value)[:NAME_CHARS]

    def content(self, content: Any, refusal: Any) -> tuple[str | None, str | None]:
        """(text, refusal) of a message whose content is text or a list of parts; None where there is none."""
        if refusal is not None and not isinstance(refusal, str):
            self.told.append("refusal is no text: not kept")
            refusal = None
        if isinstance(content, str) or content is None:
            return content, refusal
        parts = content if isinstance(content, list) else [content]
        texts, refusals = [], [refusal] if refusal else []
        for part in parts:
            kind = part.get("type", "text") if isinstance(part, dict) else "text" if isinstance(part, str) else None
            found = (
                part if isinstance(part, str) else part.get(kind, part.get("text")) if isinstance(kind, str) else None
            )
            found = found.get("value") if isinstance(found, dict) else found
            if kind in ("text", "output_text") and isinstance(found, str):
                texts.append(found)
            elif kind == "refusal" and isinstance(found, str):
                refusals.append(found)
            else:
                kind = kind if isinstance(kind, str) else "unknown"
                self.told.append(f"a part of the content of type {_brief(_HALF.sub('?', kind))} was left out")
        return "".join(texts) if texts else None, "".join(refusals) or None

    def valid(self, what: str, text: str) -> str:
        """Text that has a UTF-8; halves of surrogate pairs become U+FFFD."""
        half = _HALF.search(text)
        if half:
            self.told.append(f"{what} holds half of a surrogate pair, which became U+FFFD: not trained on")
        if half or (self._not_utf8 and "\ufffd" in text):
            self.damaged = True
        return _HALF.sub("\ufffd", text)


def _pruned(text: str) -> str:
    """JSON text with null in place of every object or list that is nested deeper than DEPTH."""
    parts, depth, kept = [], 0, 0
    for found in _TOKENS.finditer(text):
        token = found[0]
        if token in ("[", "{"):
            depth += 1
            if depth == DEPTH + 1:
                parts += [text[kept : found.start()], "null"]
        elif token in ("]", "}"):
            if depth == DEPTH + 1:
                kept = found.end()
            depth -= 1
    return "".join([*parts, text[kept:]]) if depth <= DEPTH else text


def _of_error(reason: str, error: Any, usage: Mapping[str, Any] | None) -> Unusable:
    """What an error object inside an answer means for asking again."""
    names: set[str] = set()
    if isinstance(error, dict):
        for field in ("code", "type", "status", "status_code"):
            value = error.get(field)
            if isinstance(value, str | int | float):
                names.add(re.sub(r"[^a-z0-9]", "", str(value).lower()).removesuffix("error"))
    numbers = {int(name) for name in names if re.fullmatch(r"[1-5]\d\d", name)}
    hopeless = bool(names & _HOPELESS) or any(number in _HOPELESS_STATUS for number in numbers)
    lasting = bool(names & _LASTING) or any(400 <= n < 500 and n not in _PASSING_STATUS for n in numbers)
    return Unusable(
        reason, usage, billed=True, lasting=lasting, hopeless=hopeless, filtered="contentfilter" in names,
    )  # fmt: skip


def _said(error: Any) -> str:
    """The words of an error."""
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else None
    if isinstance(message, str) and message.strip():
        return _brief(message, REASON_CHARS)
    return _brief(error if isinstance(error, str) else repr(error), REASON_CHARS) or "no reason given"


def _brief(value: Any, limit: int = 80) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[:limit] + "…"
