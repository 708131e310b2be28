"""Rows of training data: conversations with the teacher's response, from files or from the hub.

Forms of a row, by its columns:

    prompt (text or messages)  with  teacher_response, or with completion as TRL writes it (text, or one assistant turn)
    messages or content        with  teacher_response or completion
    messages or content        alone: the last turn, an assistant's, is the teacher's

A message is {"role": "system" | "user" | "assistant", "content": text}. Other columns are ignored. Where a row has
several of these columns, one named in the column map comes first, then the order messages, content, prompt, and
teacher_response, completion.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, cast

from rapidfuzz import process

from gadcore.errors import UserError

Split = Literal["train", "eval"]

CONVERSATIONS = ("messages", "content", "prompt")
RESPONSES = ("teacher_response", "completion")
ROLES = ("system", "user", "assistant")
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_BUILTIN = Path(__file__).with_name("builtin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_HUB_SPLITS = {"train": "train", "eval": "test"}


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


def load_rows(
    source: str, columns: Mapping[str, str], limit: int | None = None, *, split: Split = "train"
) -> list[RawRow]:
    """Reads the rows of a source, in order.

    source: "builtin" (the rows that come with gadcore), a .jsonl, .jsonl.gz or .parquet file, a directory of these
      (read in the order of their names), or a hub id "owner/name" or "owner/name:split".
    columns: column map, from the names above to the source's own.
    limit: at most so many rows are read.
    split: chooses the file of the built-in data, and for a hub id without a split its "train" or its "test" split.

    Raises UserError, with file and line or row, for anything that cannot be used: nothing is skipped but blank lines.
    """
    for name in columns:
        if name not in CONVERSATIONS + RESPONSES:
            choice = process.extractOne(name, CONVERSATIONS + RESPONSES)[0]
            raise UserError(
                f"data.columns has no use for {name!r} (did you mean {choice!r}?): "
                f"it maps {', '.join(CONVERSATIONS + RESPONSES)} onto the columns of {source}"
            )
    rows = [parse_row(record, columns, where) for where, record in islice(records(source, split), limit)]
    if not rows:
        raise UserError(f"{source} has no rows: give a source with at least one prompt and response")
    return rows


def parse_row(record: Any, columns: Mapping[str, str], where: str) -> RawRow:
    """Brings one record into the common form; raises UserError that begins with `where`."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected an object with columns, found {_kind(record)}")
    for name, column in columns.items():
        if column not in record:
            raise UserError(
                f"{where}: there is no column {column!r}, which data.columns maps onto {name}; {_found(record)}"
            )
    row = {**record, **{name: record[column] for name, column in columns.items()}}
    conversation = _choose(row, columns, CONVERSATIONS)
    response = _choose(row, columns, RESPONSES)
    if conversation is None:
        raise UserError(
            f"{where}: no prompt: expected one of the columns {', '.join(CONVERSATIONS)}, or another name for one of "
            f"them in data.columns; {_found(record)}"
        )
    if response is None and conversation == "prompt":
        raise UserError(
            f"{where}: no response: expected one of the columns {', '.join(RESPONSES)}, or another name for one of "
            f"them in data.columns; {_found(record)}"
        )
    if conversation == "prompt" and isinstance(row["prompt"], str):
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        messages = _messages(row[conversation], where, conversation)
    if response is None:
        if messages[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: no response: the last turn of {conversation} must be the assistant's, found "
                f"{messages[-1]['role']!r}, and there is no column {' or '.join(RESPONSES)}"
            )
        text: Any = messages.pop()["content"]
        response = conversation
    else:
        text = row[response]
        if response == "completion" and isinstance(text, list):
            turns = _messages(text, where, response)
            if [turn["role"] for turn in turns] != ["assistant"]:
                raise UserError(f"{where}: completion must be one assistant turn, found {len(turns)} turns")
            text = turns[0]["content"]
    text = _text(text, where, f"the response ({response})")
    if not messages or messages[-1]["role"] != "user":
        found = repr(messages[-1]["role"]) if messages else "nothing"
        raise UserError(f"{where}: the turn before the teacher's response must be the user's, found {found}")
    _text(messages[-1]["content"], where, "the last user turn")
    return RawRow(tuple(messages), text, where)


def _choose(row: Mapping[str, Any], columns: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The column to use: in tables that were merged from several forms, the one that is not null."""
    mapped = [name for name in names if name in columns]
    present = mapped or [name for name in names if name in row]
    return next((name for name in present if row[name] is not None), present[0] if present else None)


def _messages(value: Any, where: str, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {column} must be a list of messages, found {_kind(value)}")
    if not value:
        raise UserError(f"{where}: {column} is an empty conversation")
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            found = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else _kind(turn)
            raise UserError(f"{where}: message {number} of {column} needs role and content, found {found}")
        if turn["role"] not in ROLES:
            raise UserError(
                f"{where}: message {number} of {column} has the role {turn['role']!r}: use {', '.join(ROLES)}"
            )
        if not isinstance(turn["content"], str):
            raise UserError(
                f"{where}: the content of message {number} of {column} must be text, found {_kind(turn['content'])}"
            )
        _encodable(turn["content"], where, f"message {number} of {column}")
        messages.append({"role": str(turn["role"]), "content": turn["content"]})
    return messages


def _text(value: Any, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} must be text, found {_kind(value)}")
    if not value.strip():
        raise UserError(f"{where}: {what} is empty: remove the row or fill it in")
    return _encodable(value, where, what)


def _encodable(text: str, where: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {what} holds half of a surrogate pair (character {error.start}), which is no valid text"
        ) from None
    return text


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _found(record: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(str, record)) or 'no columns'}"


def records(source: str, split: Split) -> Iterator[tuple[str, Any]]:
    """Yields (where, record) for every record of a source."""
    if source == "builtin":
        yield from _jsonl(_BUILTIN / f"{split}.jsonl", f"builtin/{split}.jsonl")
        return
    path = Path(source)
    if path.is_dir():
        for file in _files(path):
            yield from _file(file)
    elif path.exists() or source.endswith(ENDINGS):
        yield from _file(path)
    elif _HUB_ID.fullmatch(source):
        yield from _hub(source, split)
    else:
        raise UserError(
            f"there is no file or directory {source}: data is 'builtin', a {', '.join(ENDINGS)} file, "
            "a directory of these or a hub id owner/name"
        )


def _files(directory: Path) -> list[Path]:
    entries = sorted(path for path in directory.iterdir() if not path.name.startswith((".", "README", "LICENSE")))
    for path in entries:
        if path.is_dir() or not path.name.endswith(ENDINGS):
            raise UserError(
                f"{path} is not data that can be read ({', '.join(ENDINGS)}): move it out of the directory {directory}"
            )
    if not entries:
        raise UserError(f"the directory {directory} has no {', '.join(ENDINGS)} file")
    return entries


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path}: this kind of file cannot be read: use {', '.join(ENDINGS)}")
    yield from _parquet(path) if path.name.endswith(".parquet") else _jsonl(path, str(path))


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for number, line in enumerate(file, 1):
                # Editors on Windows begin a file with a byte order mark.
                text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{name}:{number}")
                if text.strip():
                    yield f"{name}:{number}", _decode_json(text, f"{name}:{number}")
    except FileNotFoundError:
        raise UserError(f"the data file {name} does not exist") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is a broken gzip file (after line {number}): {error}") from None
    except OSError as error:
        raise UserError(f"the data file {name} cannot be read: {error.strerror}") from None


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line): save the file as UTF-8") from None


def _decode_json(text: str, where: str) -> Any:
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: broken JSON: nested too deeply") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"{path}[{index}]", record
                    index += 1
    except FileNotFoundError:
        raise UserError(f"the data file {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a text in the rows from {index} on is not UTF-8") from None
    except (ValueError, OSError) as error:  # pyarrow's own errors are both
        raise UserError(f"{path} cannot be read as parquet: {_reason(error)}") from None


def _hub(source: str, split: Split) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, named_split = source.partition(":")
    hub_split = named_split or _HUB_SPLITS[split]
    try:
        table = datasets.load_dataset(name, split=hub_split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{name} is no file or directory here, and its split {hub_split!r} could not be loaded from the hub: "
            f"{_reason(error)}"
        ) from None
    for index, record in enumerate(table):
        yield f"{name}:{hub_split}[{index}]", record
