"""Forms of a row, by its columns: what becomes of one record.

    prompt (text or messages)  with  teacher_response, or with completion as TRL writes it (text, or one assistant turn)
    messages or content        with  teacher_response or completion
    messages or content        alone: the last turn, an assistant's, is the teacher's
    conversations              as messages (ShareGPT's name for them)
    instruction, input         with  output or response, and with history, pairs of earlier turns (Alpaca)

A message is {"role": .., "content": ..}, or ShareGPT's {"from": .., "value": ..}; content is text or parts of text. The
roles of other tools are taken for what they mean (developer, human, gpt, ..). A text in a column `system` is the system
message of a conversation that has none. Other columns are ignored. Where a row has several of these columns, one named
in the column map comes first, then the order above.

The column map gives a name above the source's column, or several columns that are joined ("question+context"), or
"none": the source's column of that name is something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rapidfuzz import process

from gadcore.data.records import Broken, Record, parse_json
from gadcore.errors import UserError

CONVERSATIONS = ("messages", "content", "prompt", "conversations", "instruction")
RESPONSES = ("teacher_response", "completion")
_OF_ALPACA = ("output", "response")
NAMES = (*CONVERSATIONS, *RESPONSES, *_OF_ALPACA, "input", "history", "system")
ROLES = ("system", "user", "assistant")
_ROLES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard", "claude"), "assistant"),
}
_TOOLS = ("tool", "tools", "function", "function_call", "tool_call", "observation", "ipython", "function_response")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
# Named where a form is explained: those that everybody may write.
_TOLD = ("messages", "content", "prompt")
JOINED_BY = "\n\n"
UNUSED = "none"


@dataclass(frozen=True)
class RawRow:
    """One row before any tokenizer has seen it.

    messages: the conversation that the teacher answered, ({"role": .., "content": ..}, ..), a user turn at its end.
    teacher_response: the teacher's text, not empty.
    where: names the row for messages: "train.jsonl:17" (line) or "train.parquet[16]" (index from 0).
    """

    messages: tuple[dict[str, str], ...]
    teacher_response: str
    where: str


def check_columns(columns: Mapping[str, str], source: str, names: Iterable[str] = NAMES) -> None:
    """Raises UserError for a name that no form has."""
    names = tuple(names)
    for name in columns:
        if name not in names:
            choice = process.extractOne(name, names)[0]
            raise UserError(
                f"data.columns has no use for {name!r} (did you mean {choice!r}?): "
                f"it maps {', '.join(names)} onto the columns of {source}"
            )


def wanted_columns(columns: Mapping[str, str]) -> set[str]:
    """All columns that a row may be read from."""
    named = {part for column in columns.values() for part in (column, *column.split("+"))}
    return {*NAMES, *named}


def parse_row(record: Any, columns: Mapping[str, str], where: str) -> RawRow:
    """Brings one record into the common form; raises UserError that begins with `where`."""
    try:
        return _parse(record, columns, where)
    except _Lacking as error:
        raise LackingColumns(f"{where}: {error}", record, columns) from None
    except _Unusable as error:
        raise UserError(f"{where}: {error}") from None


class LackingColumns(UserError):
    """A record has no column for prompt or response.

    names: its columns. kept: what of the column map it has. lacking: "prompt", "teacher_response" or both, as far as
    it has none for them. free: its columns that are used for neither.
    """

    def __init__(self, message: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        super().__init__(message)
        self.record, self.names = record, _names(record)
        self.kept = {name: column for name, column in columns.items() if has_column(record, column)}
        row = _mapped(record, self.kept)
        conversation = _choose(row, self.kept, CONVERSATIONS)
        response = _choose(row, self.kept, _responses(conversation, self.kept))
        taken = {
            conversation,
            response,
            *(part for column in self.kept.values() for part in (column, *column.split("+"))),
        }
        self.free = tuple(name for name in self.names if name not in taken)
        self.lacking = tuple(
            name
            for name, lacks in (
                ("prompt", conversation is None),
                ("teacher_response", response is None and conversation in (None, "prompt", "instruction")),
            )
            if lacks
        )


def has_column(record: Mapping[str, Any], column: str) -> bool:
    """Whether a record has what a column map names: a column, several that are joined, or none."""
    return column in record or column == UNUSED or all(part in record for part in column.split("+"))


class _Unusable(Exception):
    """Says why a record is no row, as the end of a sentence that begins with its place."""


class _Lacking(_Unusable):
    """It has no column for something."""


def _parse(record: Any, columns: Mapping[str, str], where: str) -> RawRow:
    if isinstance(record, Broken):
        raise _Unusable(record.reason)
    if not isinstance(record, Mapping):
        raise _Unusable(f"expected an object with columns, found {_kind(record)}")
    row = _mapped(record, columns)
    conversation = _choose(row, columns, CONVERSATIONS)
    if conversation is None:
        raise _Lacking(
            f"no prompt: expected one of the columns {', '.join(_TOLD)}, or another name for one of "
            f"them in the column map; {_found(record)}"
        )
    plain = conversation == "instruction" or (conversation == "prompt" and isinstance(row["prompt"], str))
    response = _choose(row, columns, _responses(conversation, columns))
    if response is None and conversation in ("prompt", "instruction"):
        raise _Lacking(
            f"no response: expected one of the columns {', '.join(_responses(conversation))}, or another name for one "
            f"of them in the column map; {_found(record)}"
        )
    messages = _plain(row, conversation) if plain else _messages(row[conversation], conversation)
    if response is None:
        if messages[-1]["role"] != "assistant":
            raise _Unusable(
                f"no response: the last turn of {conversation} must be the assistant's, found "
                f"{messages[-1]['role']!r}, and there is no column {' or '.join(RESPONSES)}"
            )
        text: Any = messages.pop()["content"]
        response = conversation
    else:
        text = _response(row[response], response)
    text = _text(text, f"the response ({response})")
    messages = _with_system(messages, row, columns)
    if not messages or messages[-1]["role"] != "user":
        found = repr(messages[-1]["role"]) if messages else "nothing"
        raise _Unusable(f"the turn before the teacher's response must be the user's, found {found}")
    _text(messages[-1]["content"], "the last user turn")
    _said_once(record, columns, (conversation, response, "system", *(("input", "history") if plain else ())))
    return RawRow(tuple(messages), text, where)


def _mapped(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the names of the forms for the columns that the map names."""
    row = dict(record)
    for name, column in columns.items():
        if column == UNUSED and UNUSED not in record:
            row.pop(name, None)
            continue
        parts = [column] if column in record else column.split("+")
        for part in parts:
            if part not in record:
                raise _Lacking(f"there is no column {part!r}, which data.columns maps onto {name}; {_found(record)}")
        row[name] = record[column] if column in record else _joined(record, parts)
    return row


def _joined(record: Mapping[str, Any], parts: Iterable[str]) -> str:
    """Texts with a blank line between them; those that are null or empty are left out."""
    texts = [(part, record[part]) for part in parts if record[part] not in (None, "")]
    return JOINED_BY.join(_string(text, f"the column {part!r}, which is joined with others,") for part, text in texts)


def _said_once(record: Mapping[str, Any], columns: Mapping[str, str], used: Iterable[str]) -> None:
    """Refuses a row that says a column twice which it is read from: one of the two would be lost."""
    twice: Iterable[str] = getattr(record, "twice", ())
    if twice:
        names = {part for name in used for part in (columns.get(name, name), *columns.get(name, name).split("+"))}
        if found := sorted(names.intersection(twice)):
            raise _Unusable(f"the column {found[0]!r} is there twice: keep one of them, or rename it")


def _choose(row: Mapping[str, Any], columns: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The column to use: in tables that were merged from several forms, the one that is not null."""
    mapped = [name for name in names if name in columns and name in row]
    present = mapped or [name for name in names if name in row]
    return next((name for name in present if row[name] not in (None, "")), present[0] if present else None)


def _plain(row: Mapping[str, Any], conversation: str) -> list[dict[str, str]]:
    """A prompt that is one text, with what Alpaca has beside it."""
    text: str = row[conversation]
    if conversation != "instruction":
        return [{"role": "user", "content": text}]
    _string(text, conversation)
    if row.get("input") not in (None, ""):
        text = JOINED_BY.join((text, _string(row["input"], "input")))
    messages = []
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Unusable(f"item {number} of history must be a question and its answer, found {_kind(pair)}")
        for role, part in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _string(part, f"item {number} of history")})
    return [*messages, {"role": "user", "content": text}]


def _response(value: Any, column: str) -> Any:
    if not isinstance(value, list):
        return value
    if column == "completion":
        turns = _messages(value, column)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise _Unusable(f"completion must be one assistant turn, found {len(turns)} turns")
        return turns[0]["content"]
    return _content(value, f"the response ({column})")


def _with_system(
    messages: list[dict[str, str]], row: Mapping[str, Any], columns: Mapping[str, str]
) -> list[dict[str, str]]:
    system = row.get("system")
    if system is None or system == "" or not (isinstance(system, str) or "system" in columns):
        return messages
    text = _string(system, "the column system")
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and own != [text]:
        raise _Unusable(
            "the conversation has a system message and the column system another one: take one away, or set "
            'data.columns to {system = "none"} where the column is something else'
        )
    return messages if own else [{"role": "system", "content": text}, *messages]


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if isinstance(value, str) and column in ("messages", "conversations") and value.lstrip().startswith("["):
        # As CSV has to write them.
        try:
            value = parse_json(value.strip())
        except (ValueError, RecursionError):
            raise _Unusable(f"{column} is text that is no JSON list of messages") from None
    if not isinstance(value, list):
        raise _Unusable(f"{column} must be a list of messages, found {_kind(value)}")
    if not value:
        raise _Unusable(f"{column} is an empty conversation")
    return [_message(turn, f"message {number} of {column}") for number, turn in enumerate(value, 1)]


def _message(turn: Any, what: str) -> dict[str, str]:
    keys = ("role", "content")
    if isinstance(turn, Mapping) and not all(key in turn for key in keys) and "from" in turn and "value" in turn:
        keys = ("from", "value")
    if not isinstance(turn, Mapping) or not all(key in turn for key in keys):
        found = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else _kind(turn)
        raise _Unusable(f"{what} needs role and content, found {found}")
    if twice := set(keys).intersection(getattr(turn, "twice", ())):
        raise _Unusable(f"{what} has the key {min(twice)!r} twice: keep one of them")
    role, content = (turn[key] for key in keys)
    if isinstance(role, str) and role.lower() in _TOOLS:
        raise _Unusable(
            f"{what} is a tool's turn ({role}), and gadcore trains on conversations of text alone: remove the row"
        )
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise _Unusable(f"{what} has the role {role!r}: use {', '.join(ROLES)}")
    if calls := turn.get("tool_calls") or turn.get("function_call"):
        raise _Unusable(
            f"{what} calls a tool ({_tool(calls)}), and gadcore trains on conversations of text alone: remove the row"
        )
    if content is None and isinstance(turn.get("refusal"), str):
        raise _Unusable(f"{what} is a refusal and has no content: remove the row, or write the refusal as its content")
    return {"role": known, "content": _content(content, f"the content of {what}")}


def _tool(calls: Any) -> str:
    """The name of the first tool that is called, as far as there is one."""
    call = calls[0] if isinstance(calls, list) else calls
    call = call.get("function", call) if isinstance(call, Mapping) else call
    name = call.get("name") if isinstance(call, Mapping) else None
    return name if isinstance(name, str) else "without a name"


def _content(value: Any, what: str) -> str:
    """Text, or the parts of it put together."""
    if not isinstance(value, list):
        return _string(value, what)
    texts = []
    for number, part in enumerate(value, 1):
        if isinstance(part, Mapping):
            if not isinstance(part.get("text"), str) or part.get("type") not in _TEXT_PARTS:
                kind = part.get("type") or f"the keys {', '.join(map(str, part))}"
                raise _Unusable(f"part {number} of {what} is no text ({kind}): gadcore trains on text alone")
            part = part["text"]
        texts.append(_string(part, f"part {number} of {what}"))
    return "".join(texts)


def _text(value: Any, what: str) -> str:
    text = _string(value, what)
    if not text.strip():
        raise _Unusable(f"{what} is empty: remove the row or fill it in")
    return text


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"{what} must be text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Unusable(
            f"{what} holds half of a surrogate pair (character {error.start}), which is no valid text"
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def _responses(conversation: str | None, columns: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The columns that a response may be in; Alpaca's are one of its rows, or where the map has them."""
    known = (*RESPONSES, *_OF_ALPACA) if conversation == "instruction" else RESPONSES
    return (*known, *(name for name in _OF_ALPACA if name in (columns or {}) and name not in known))


def _names(record: Mapping[str, Any]) -> tuple[str, ...]:
    return record.names if isinstance(record, Record) else tuple(record)


def _found(record: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(str, _names(record))) or 'no columns'}"
