"""Records as files hold them, before anybody asks what they mean: JSON lines, a JSON array, CSV.

A record that cannot be read while the next one can is a `Broken`, so that all of them are told at once; whatever ends
the reading of a file raises UserError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from gadcore.errors import UserError

# Digits of an integer that Python converts by default; longer ones cost quadratic time and are refused.
_MOST_DIGITS = 4000
_BLANK = re.compile(r"[ \t\r\n]*")
_QUOTED = re.compile(r'"[^"]*"')
_DELIMITERS = ",;\t"
_BOM = b"\xef\xbb\xbf"


class Record(dict[str, Any]):
    """The columns of one record that were read. names: of all that it has; twice: those that it has more than once."""

    def __init__(self, content: Iterable[tuple[str, Any]], names: Sequence[str], twice: Iterable[str] = ()) -> None:
        super().__init__(content)
        self.names = tuple(names)
        self.twice = frozenset(twice)


@dataclass(frozen=True)
class Broken:
    """Stands for a record that cannot be read. reason: why, as the end of a sentence that begins with its place."""

    reason: str


def repeated(names: Sequence[str]) -> list[str]:
    """The names that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1] if len(set(names)) < len(names) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    return Record(pairs, tuple(found), repeated([name for name, _ in pairs]))


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def parse_json(text: str) -> Any:
    """The value of a JSON text; an object with a key twice is a Record that says so.

    Raises ValueError, and RecursionError where it is nested too deeply.
    """
    return _JSON.decode(text)


def json_records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of a file of JSON lines, or of one JSON array. name: the file's, in `where`."""
    with _reading(path, name) as file:
        first = _first_byte(file, name)
        file.seek(0)
        yield from _array(file, name) if first == b"[" else _lines(file, name)


def csv_records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of a CSV or TSV file with a header; where names the line that a record begins in."""
    csv.field_size_limit(2**31 - 1)
    tabs = ".tsv" in path.suffixes
    line = 0
    with _reading(path, name) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        _first_byte(file, name)
        file.seek(0)
        try:
            head = text.readline()
            text.seek(0)
            outside = _QUOTED.sub("", head)
            delimiter = "\t" if tabs else max(_DELIMITERS, key=outside.count)
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            header: list[str] = []
            twice: list[str] = []
            for fields in reader:
                begin, line = line + 1, reader.line_num
                if not fields:
                    continue
                if not header:
                    header = [field.strip() for field in fields]
                    twice = repeated(header)
                elif len(fields) != len(header):
                    reason = f"{len(fields)} fields, the header has {len(header)}: quote texts that hold {delimiter!r}"
                    yield f"{name}:{begin}", Broken(reason)
                else:
                    yield f"{name}:{begin}", Record(zip(header, fields, strict=True), header, twice)
        except UnicodeDecodeError:
            # The text was read in blocks: the place in it is not that in the file.
            raise UserError(f"{name}{_not_utf8(path, name)}: save the file as UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{name}:{line + 1}: broken CSV: {error}") from None


def _not_utf8(path: Path, name: str) -> str:
    """Where a file is not UTF-8: ":3: not UTF-8 (byte 5 of the line)", lines from 1 and bytes from 0."""
    with _reading(path, name) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                before = line[: error.start]
                # A line may end in a carriage return alone.
                return (
                    f":{number + before.count(13)}: not UTF-8 (byte {error.start - before.rfind(13) - 1} of the line)"
                )
    return ": not UTF-8"


class _reading:
    """The bytes of a file, unpacked where it is compressed; what goes wrong inside is told with the file's name."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._file: IO[bytes] | None = None

    def __enter__(self) -> IO[bytes]:
        try:
            packed = self._path.suffix == ".gz"
            self._file = cast("IO[bytes]", gzip.open(self._path) if packed else self._path.open("rb"))
        except OSError as error:
            raise self._told(error) from None
        return self._file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._file is not None:
            self._file.close()
        if isinstance(error, (EOFError, OSError, zlib.error)):
            raise self._told(error) from None

    def _told(self, error: EOFError | OSError | zlib.error) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"the data file {self._name} does not exist")
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
            return UserError(f"{self._name} is a broken gzip file: {error}")
        return UserError(f"the data file {self._name} cannot be read: {error.strerror or error}")


def _first_byte(file: IO[bytes], name: str) -> bytes:
    """The first byte that is no white space."""
    start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{name} is not UTF-8 but UTF-16: save the file as UTF-8")
    rest = start.removeprefix(_BOM).lstrip()
    while not rest and start:
        start = file.read(4096)
        rest = start.lstrip()
    return rest[:1]


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            try:
                # Editors on Windows begin a file with a byte order mark.
                text = (line.removeprefix(_BOM) if number == 1 else line).decode()
                if text.strip():
                    yield where, parse_json(text.rstrip())
            except UnicodeDecodeError as error:
                yield where, Broken(f"not UTF-8 (byte {error.start} of the line): save the file as UTF-8")
            except json.JSONDecodeError as error:
                if text.strip() == "{" and number == 1 and name.endswith((".json", ".json.gz")):
                    raise UserError(
                        f"{name} is neither a list of rows nor a row a line: write [ and ] around its rows, with "
                        "commas between them, or each on one line"
                    ) from None
                yield where, Broken(f"broken JSON: {error.msg} (column {error.colno})")
            except RecursionError:
                yield where, Broken("broken JSON: nested too deeply")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is a broken gzip file (after line {number}): {error}") from None


def _array(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """The items of an array one by one: the text is held, not the rows."""
    try:
        text = file.read().removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start}): save the file as UTF-8") from None
    at, index = _skip(text, text.index("[") + 1), 0
    try:
        while text[at : at + 1] != "]" or index:
            item, at = _JSON.raw_decode(text, at)
            yield f"{name}[{index}]", item
            index, at = index + 1, _skip(text, at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip(text, at + 1)
        if (after := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data after the list", text, after)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{name}[{index}]: broken JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise UserError(f"{name}[{index}]: broken JSON: nested too deeply") from None


def _skip(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no white space."""
    found = _BLANK.match(text, at)
    return found.end() if found else at
