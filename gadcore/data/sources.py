"""Where rows come from: files, directories, the hub, and the rows that come with gadcore."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import xxhash

from gadcore.data.batch_api import joined
from gadcore.data.records import Record, csv_records, json_records, repeated
from gadcore.errors import UserError
from gadcore.files import checksum

Split = Literal["train", "eval"]

BUILTIN = "builtin"
_JSON = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz")
_CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # as they are told; all but parquet also with .gz
_ALL = (*_JSON, *_CSV, ".parquet")
# What may lie beside data in a directory; other names are told, since they may be data that would be missed.
_NO_DATA = ("readme", "readme.md", "readme.txt", "license", "license.md", "license.txt")
_FOLDER = Path(__file__).with_name("builtin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_HUB_SPLITS = {"train": "train", "eval": "test"}
# Bytes of text in one of a packed file, roughly.
_PACKED = 4


@dataclass(frozen=True)
class Source:
    """One source, found and not read yet.

    name: as the user gave it. files: (path, its name in messages), in order. table: of the hub, with its split.
    """

    name: str
    files: tuple[tuple[Path, str], ...] = ()
    table: Any = None
    table_name: str = ""

    @classmethod
    def find(cls, name: str, split: Split) -> Source:
        """Raises UserError where there is nothing of that name, or a directory holds something that is no data."""
        if name == BUILTIN:
            return cls(name, ((_FOLDER / f"{split}.jsonl", f"builtin/{split}.jsonl"),))
        path = Path(name)
        try:
            if path.is_dir():
                return cls(name, tuple((file, str(file)) for file in _files(path)))
            exists = path.exists()
        except (OSError, ValueError) as error:  # a NUL, or a name that is too long
            raise UserError(f"the data file {name!r} cannot be read: {_reason(error)}") from None
        if exists or name.endswith(_ALL):
            return cls(name, ((path, str(path)),))
        if _HUB_ID.fullmatch(name):
            table, hub_split = _hub(name, split)
            return cls(name, table=table, table_name=f"{name.partition(':')[0]}:{hub_split}")
        raise UserError(
            f"there is no file or directory {name}: data is 'builtin', a {', '.join(ENDINGS)} file, "
            "a directory of these or a hub id owner/name"
        )

    @classmethod
    def check(cls, name: str) -> None:
        """Raises UserError for the name of a file that is not there; other sources are not asked, which is slow."""
        if name != BUILTIN and name.endswith(_ALL) and not os.path.lexists(name):
            raise UserError(f"the data file {name} does not exist")

    @property
    def size(self) -> int:
        """Bytes of text, roughly; 0 where a file is not there."""
        if self.table is not None:
            return int(self.table.data.nbytes)
        return sum(
            path.stat().st_size * (_PACKED if path.suffix in (".gz", ".parquet") else 1)
            for path, _ in self.files
            if path.is_file()
        )

    def fingerprint(self) -> str | None:
        """Changes when the content does; None where that cannot be told (a table that lies in no file)."""
        paths = [path for path, _ in self.files] or [Path(file["filename"]) for file in self.table.cache_files]
        if not paths:
            return None
        names = [name for _, name in self.files] or [self.table_name]
        return xxhash.xxh3_128_hexdigest(repr([names, [checksum(path) for path in paths]]).encode())

    def records(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Yields (where, record) for every record. wanted: columns that may be used, others need not be readable."""
        if self.table is not None:
            return _of_table(self.table, self.table_name, wanted)
        return joined(chain.from_iterable(_file(path, name, wanted) for path, name in self.files))


def _files(directory: Path) -> list[Path]:
    entries = sorted(
        path
        for path in directory.iterdir()
        if not path.name.startswith(".") and (path.is_dir() or path.name.lower() not in _NO_DATA)
    )
    for path in entries:
        if path.is_dir() or not path.name.endswith(_ALL):
            raise UserError(
                f"{path} is not data that can be read ({', '.join(ENDINGS)}): move it out of the directory {directory}"
            )
    if not entries:
        raise UserError(f"the directory {directory} has no {', '.join(ENDINGS)} file")
    return entries


def _file(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    if path.name.endswith(_JSON):
        return json_records(path, name)
    if path.name.endswith(_CSV):
        return csv_records(path, name)
    if path.name.endswith(".parquet"):
        return _parquet(path, wanted)
    raise UserError(f"{path}: this kind of file cannot be read: use {', '.join(ENDINGS)}")


def _parquet(path: Path, wanted: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = repeated(names)
            used = [name for name in dict.fromkeys(names) if wanted is None or name in wanted]
            for batch in file.iter_batches(batch_size=1024, columns=used):
                columns = [column.to_pylist() for column in batch.columns]
                for i in range(batch.num_rows):
                    row = ((name, column[i]) for name, column in zip(batch.schema.names, columns, strict=True))
                    yield f"{path}[{index}]", Record(row, names, twice)
                    index += 1
    except FileNotFoundError:
        raise UserError(f"the data file {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a text in the rows from {index} on is not UTF-8") from None
    except NotImplementedError as error:
        raise UserError(
            f"{path} has a column of a type that cannot be read ({_reason(error)}): write the file again without it"
        ) from None
    except (ArrowException, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {_reason(error)}") from None


def _of_table(table: Any, name: str, wanted: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    names = tuple(table.column_names)
    used = [column for column in names if wanted is None or column in wanted]
    for index, record in enumerate(table.select_columns(used) if used else ({} for _ in range(len(table)))):
        yield f"{name}[{index}]", Record(record.items(), names)


def _hub(source: str, split: Split) -> tuple[Any, str]:
    import datasets

    name, _, named_split = source.partition(":")
    hub_split = named_split or _HUB_SPLITS[split]
    try:
        return datasets.load_dataset(name, split=hub_split), hub_split
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{name} is no file or directory here, and its split {hub_split!r} could not be loaded from the hub: "
            f"{_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
