"""Responses on disk, the border between sampling and every measure: <out>/<set>/<model>.jsonl, one row per response.

    {"prompt": the last user text, "messages": [{"role": .., "content": ..}, ..], "reference": text, "response": text,
     "finished": whether the response ended by itself, "source": where the row came from,
     "reference_finished": false where the reference was cut at the length limit, "index": the row's number in its set,
     "sample": the response's number among those to its prompt}

The last three may be missing: a reference is then whole, rows are numbered from 0 in the order of the file, and a
response is its prompt's first. Several to a prompt stand behind each other, equally many to each. Responses of other
systems can be measured by writing such files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from gadcore.errors import UserError
from gadcore.files import parse_json, write_jsonl, write_whole


@dataclass(frozen=True)
class ResponseRow:
    """One response beside its reference; fields as in the module's docstring."""

    prompt: str
    messages: tuple[dict[str, str], ...]
    reference: str
    response: str
    finished: bool
    source: str
    reference_finished: bool
    index: int
    sample: int = 0


_TEXTS = ("prompt", "reference", "response", "source")


def read_responses(path: Path) -> list[ResponseRow]:
    """The rows of a file, at least one. Raises UserError that names file, line and key for what cannot be used."""
    try:
        # Not splitlines(): JSON strings may hold U+2028 and its like.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: sample the responses with eval, or write the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    rows = [_row(line, f"{path}:{number}", number - 1) for number, line in enumerate(lines, 1)]
    each = max(row.sample for row in rows) + 1
    if len(rows) % each:
        raise UserError(
            f"{path}: {len(rows)} rows are no whole number of {each} samples each: delete it and run eval again"
        )
    for number, row in enumerate(rows):
        place, sample = divmod(number, each)
        if row.sample != sample or row.index != rows[place * each].index:
            raise UserError(
                f"{path}:{number + 1}: sample {row.sample} of prompt {row.index} is out of its place: every prompt has "
                f"samples 0 to {each - 1}, one behind the other"
            )
    return rows


def read_first(path: Path) -> list[ResponseRow]:
    """The first response to every prompt of a file; raises as read_responses() does."""
    return [row for row in read_responses(path) if row.sample == 0]


def by_prompt(rows: Sequence[ResponseRow], values: Sequence[float]) -> list[float]:
    """The mean of every prompt's values, of one value a row."""
    each = max(row.sample for row in rows) + 1
    return [fmean(values[start : start + each]) for start in range(0, len(rows), each)]


def write_responses(path: Path, rows: Sequence[ResponseRow]) -> None:
    """Writes all rows in one move, so that the file is whole or not there."""
    write_jsonl(path, ({k: v for k, v in asdict(row).items() if (k, v) != ("sample", 0)} for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one move. Half of a surrogate pair becomes its JSON escape."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", errors="backslashreplace")


def digest_of(value: object) -> str:
    """32 hexadecimal digits that change with the value's repr(): whether files were made from these very rows."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def _row(line: str, where: str, index: int) -> ResponseRow:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: broken JSON ({error}): mend or delete the line") from None
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object: mend or delete the line")
    row = {"reference_finished": True, "index": index, "sample": 0, **row}
    wrong = [key for key in _TEXTS if not _is_text(row.get(key))]
    wrong += [key for key in ("finished", "reference_finished") if not isinstance(row.get(key), bool)]
    wrong += ["index"] if type(row["index"]) is not int else []
    wrong += ["sample"] if type(row["sample"]) is not int or not 0 <= row["sample"] < 10**6 else []
    if not _conversation(row.get("messages")):
        wrong.append("messages")
    if wrong:
        raise UserError(
            f"{where}: {', '.join(wrong)} missing or not of the right kind: gadcore/evaluate/responses.py describes "
            "the rows"
        )
    kept = {field.name: row[field.name] for field in fields(ResponseRow)}
    return ResponseRow(**kept | {"messages": tuple(kept["messages"])})


def _conversation(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(m, Mapping) and _is_text(m.get(k)) for m in messages for k in ("role", "content"))


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair, which JSON can write, is no text: a tokenizer would fail on it.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
