"""Groups of many rows: encoded once, kept in an Arrow file, and read from there one by one.

A file holds what became of one source under one template and one set of limits; its folder's name is a digest of all
that it depends on, the code that wrote it included. Reading maps the file: nothing but the rows in use is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash

from gadcore.config.settings import DataSettings
from gadcore.data.batches import DataReport, Encoder
from gadcore.data.facts import prompt_key
from gadcore.data.forms import RawRow
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.rows import BadRows, good_rows, read_rows
from gadcore.data.sources import Source
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.files import checksum, whole_folder

# Bytes of text from which on a source is kept encoded; below, encoding takes a few seconds.
KEPT_FROM = 16 << 20
_BATCH = 1024
_ROWS, _REPORT = "rows.arrow", "report.json"
_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "messages": pa.string(),
        "prompt": pa.list_(pa.int32()),
        "text": pa.string(),
        "response": pa.list_(pa.int32()),
        "finished": pa.bool_(),
        "key": pa.uint64(),
    }
)
_FIELDS = ("max_prompt_tokens", "max_response_tokens", "long_prompt", "long_response", "columns", "bad_rows")


class _Lazy(Sequence[Group]):
    """A sequence of groups that are made when they are asked for."""

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        if isinstance(index, slice):
            return Subset(self, np.arange(len(self))[index])
        place = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._group(place)

    def _group(self, place: int) -> Group:
        raise NotImplementedError


class EncodedGroups(_Lazy):
    """The groups of a file that write() made. Raises UserError where it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._count = sum(self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"the encoded rows in {path.parent} are damaged: delete that folder ({error})") from None

    def __len__(self) -> int:
        return self._count

    def _group(self, place: int) -> Group:
        batch, row = self._reader.get_batch(place // _BATCH), place % _BATCH
        index, messages, prompt, text, response, finished, _ = (column[row] for column in batch.columns)
        return Group(
            Prompt(index.as_py(), tuple(json.loads(messages.as_py())), tuple(prompt.values.to_numpy().tolist())),
            Response(text.as_py(), tuple(response.values.to_numpy().tolist()), finished.as_py()),
        )

    def column(self, name: str) -> np.ndarray:
        """A column of numbers whole, or the lengths of a column of lists."""
        parts = (self._reader.get_batch(i).column(name) for i in range(self._reader.num_record_batches))
        return np.concatenate(
            [(part.value_lengths() if pa.types.is_list(part.type) else part).to_numpy() for part in parts]
        )


class Subset(_Lazy):
    """Some groups of a sequence. places: of them, in their order here."""

    def __init__(self, groups: Sequence[Group], places: np.ndarray) -> None:
        self.groups, self.places = groups, places

    def __len__(self) -> int:
        return len(self.places)

    def _group(self, place: int) -> Group:
        return self.groups[int(self.places[place])]


def token_lengths(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts and of the teacher's responses, [rows] each; no group is made for it that is on a disk."""
    if isinstance(groups, Subset):
        prompts, responses = token_lengths(groups.groups)
        return prompts[groups.places], responses[groups.places]
    if isinstance(groups, EncodedGroups):
        return groups.column("prompt"), groups.column("response")
    lengths = [(len(group.prompt.token_ids), len(group.teacher.token_ids)) for group in groups]
    prompts, responses = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    return prompts, responses


def prompt_keys(groups: Sequence[Group]) -> np.ndarray:
    """[rows] uint64, equal for equal prompts."""
    if isinstance(groups, EncodedGroups):
        return groups.column("key")
    return np.array([prompt_key(group.prompt.messages) for group in groups], dtype=np.uint64)


def split_off(
    groups: Sequence[Group], share: float, most: int | None, seed: int
) -> tuple[Sequence[Group], Sequence[Group]]:
    """(groups to train on, groups held out): about `share` of them, `most` at most, and one of each at least.

    Which ones is a function of the seed and of their prompts, whatever their order; rows with one prompt stay together.
    Raises UserError where there are no two different prompts.
    """
    salt = np.uint64(xxhash.xxh3_64_intdigest(str(seed).encode()))
    mixed = prompt_keys(groups) ^ salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    order = np.argsort(mixed, kind="stable")
    # Where another prompt begins, in that order.
    begins = np.flatnonzero(np.diff(mixed[order])) + 1
    if not len(begins):
        raise UserError(
            f"{len(groups)} training rows with one prompt between them are too few to hold some out: name held-out "
            "rows by data.eval, or set it to none"
        )
    count = min(round(share * len(groups)), most or len(groups))
    fits = begins[begins <= count]
    cut = int(fits[-1] if len(fits) else begins[0])
    train, held_out = np.sort(order[cut:]), np.sort(order[:cut])
    return Subset(groups, train), Subset(groups, held_out)


class Rows:
    """The rows of one source: read at once where they are few, else no earlier than their groups are asked for."""

    def __init__(self, source: Source, settings: DataSettings, limit: int | None) -> None:
        """limit: at most so many rows. Raises UserError where the source cannot be read."""
        self._source, self._settings, self._limit = source, settings, limit
        self._bad = BadRows()
        self.many = source.size >= KEPT_FROM
        self._rows: Iterable[RawRow] = good_rows(read_rows(source, settings.columns, limit, skip=self._skip), self._bad)
        if not self.many:
            self._rows = list(self._rows)

    @property
    def _skip(self) -> bool:
        return self._settings.bad_rows == "skip"

    def check(self) -> None:
        """Raises UserError for bad rows that have been read."""
        if self._bad.count and not self._skip:
            raise self._bad.error(self._source.name)

    def groups(self, template: ChatTemplate, cache: Path) -> tuple[Sequence[Group], DataReport, list[str]]:
        """(groups, what became of the rows, what to say of the cache). cache: folder for what many rows become.

        Raises UserError for rows that cannot be used, all of them at once, and where none is left.
        """
        encoder = Encoder(template, self._settings, self._bad)
        fingerprint = self._source.fingerprint() if self.many else None
        if fingerprint is None:
            groups = list(encoder.groups(self._rows))
            return groups, encoder.report(self._source.name, skip=self._skip), []
        folder = cache / "rows" / self._key(fingerprint, template)
        made = not (folder / _REPORT).is_file()
        if made:
            self._write(folder, encoder)
        kept = EncodedGroups(folder / _ROWS)
        try:
            report = DataReport.from_json(json.loads((folder / _REPORT).read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"the encoded rows in {folder} are damaged: delete that folder") from None
        size = (folder / _ROWS).stat().st_size / 2**30
        verb = "encoded once and kept" if made else "read as they were encoded before"
        return kept, report, [f"{len(kept)} rows of {self._source.name} were {verb}: {folder} ({size:.1f} GiB)"]

    def _key(self, fingerprint: str, template: ChatTemplate) -> str:
        settings = {name: getattr(self._settings, name) for name in _FIELDS}
        code = [checksum(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
        content = (self._source.name, fingerprint, self._limit, settings, template.fingerprint(), code)
        return xxhash.xxh3_128_hexdigest(repr(content).encode())

    def _write(self, folder: Path, encoder: Encoder) -> None:
        try:
            with whole_folder(folder, shared=True) as partial:
                write(partial / _ROWS, encoder.groups(self._rows))
                report = encoder.report(self._source.name, skip=self._skip)
                (partial / _REPORT).write_text(json.dumps(report.as_json()), encoding="utf-8")
        except OSError as error:
            if not (folder / _REPORT).is_file():  # else another process was faster
                raise UserError(
                    f"the encoded rows cannot be kept in {folder.parent} ({error.strerror}): make room there, or name "
                    "another folder by the environment variable GADCORE_CACHE"
                ) from None


def write(path: Path, groups: Iterable[Group]) -> None:
    """Writes groups without samples as EncodedGroups reads them."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        left = iter(groups)
        while batch := list(islice(left, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist([_record(group) for group in batch], schema=_SCHEMA))


def _record(group: Group) -> dict[str, Any]:
    return {
        "index": group.prompt.index,
        "messages": json.dumps(group.prompt.messages, ensure_ascii=False),
        "prompt": group.prompt.token_ids,
        "text": group.teacher.text,
        "response": group.teacher.token_ids,
        "finished": group.teacher.finished,
        "key": prompt_key(group.prompt.messages),
    }
