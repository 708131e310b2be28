"""Groups of many rows: encoded once, kept in an Arrow file, and read from there one by one.

A file holds what became of one source under one template and one set of limits; its folder's name is a digest of all
that it depends on, the code that wrote it included. Reading maps the file: nothing but the rows in use is in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash

from gadcore.config.data import DataSettings
from gadcore.data.batches import DataReport, Encoder
from gadcore.data.columns import by_setting
from gadcore.data.facts import prompt_key
from gadcore.data.forms import RawRow
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.rows import BadRows, good_rows, read_rows
from gadcore.data.sources import Source
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.files import checksum, temporaries, whole_folder

# Bytes of text from which on a source is kept encoded; below, encoding takes a few seconds.
KEPT_FROM = 16 << 20
_BATCH = 1024
# Seconds between two words on how far it is.
_SILENCE = 10
_ROWS, _INDEX, _REPORT = "rows.arrow", "index.npy", "report.json"
_INDEXED = np.dtype([("prompt", np.int32), ("response", np.int32), ("key", np.uint64), ("digest", np.uint64)])
# Seconds after which a folder that nobody fills any more was left behind by a process that was killed.
_ABANDONED = 3600
_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "messages": pa.string(),
        "prompt": pa.list_(pa.int32()),
        "text": pa.string(),
        "response": pa.list_(pa.int32()),
        "finished": pa.bool_(),
    }
)
_FIELDS = (
    "max_prompt_tokens",
    "max_response_tokens",
    "long_prompt",
    "long_response",
    "columns",
    "bad_rows",
    "reasoning",
)


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
    """The groups of a folder that write() filled. Raises UserError where it is damaged.

    known: of every row the tokens of its prompt and response, prompt_key() of its prompt, and a digest of all of it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.known = np.load(folder / _INDEX)
            self._reader = pa.ipc.open_file(pa.memory_map(str(folder / _ROWS)))
            if self._reader.num_record_batches != -(-len(self.known) // _BATCH):
                raise ValueError("its files do not belong together")
        except (pa.ArrowException, OSError, ValueError, EOFError) as error:
            raise damaged(folder, error) from None

    def __len__(self) -> int:
        return len(self.known)

    def _group(self, place: int) -> Group:
        batch, row = self._reader.get_batch(place // _BATCH), place % _BATCH
        index, messages, prompt, text, response, finished = (column[row] for column in batch.columns)
        return Group(
            Prompt(index.as_py(), tuple(json.loads(messages.as_py())), tuple(prompt.values.to_numpy().tolist())),
            Response(text.as_py(), tuple(response.values.to_numpy().tolist()), finished.as_py()),
        )


def damaged(folder: Path, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"the encoded rows in {folder} are damaged: delete that folder ({reason})")


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
        return groups.known["prompt"], groups.known["response"]
    lengths = [(len(group.prompt.token_ids), len(group.teacher.token_ids)) for group in groups]
    prompts, responses = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    return prompts, responses


def row_digests(groups: Sequence[Group]) -> np.ndarray | None:
    """[rows] uint64, of all that a row is, as they were written; None for groups that are on no disk."""
    if isinstance(groups, Subset):
        found = row_digests(groups.groups)
        return None if found is None else found[groups.places]
    return groups.known["digest"] if isinstance(groups, EncodedGroups) else None


def prompt_keys(groups: Sequence[Group]) -> np.ndarray:
    """[rows] uint64, equal for equal prompts."""
    if isinstance(groups, EncodedGroups):
        return groups.known["key"]
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

    def __init__(
        self, source: Source, settings: DataSettings, limit: int | None, columns: str = "data.columns"
    ) -> None:
        """limit: at most so many rows. columns: the setting that settings.columns come from.

        Raises UserError where the source cannot be read.
        """
        self._source, self._settings, self._limit = source, settings, limit
        self._bad = BadRows(told=by_setting(columns))
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
            raise self._bad.error(self._source.name, may_skip=True)

    def groups(
        self, template: ChatTemplate, cache: Path, say: Callable[[str], None]
    ) -> tuple[Sequence[Group], DataReport, list[str]]:
        """(groups, what became of the rows, what to say of the cache).

        cache: folder for what many rows become. say: is told how far that is, every ten seconds.
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
            self._write(folder, encoder, say)
        kept = EncodedGroups(folder)
        try:
            report = DataReport.from_json(json.loads((folder / _REPORT).read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise damaged(folder, error) from None
        size = (folder / _ROWS).stat().st_size / 2**30
        verb = "encoded once and kept" if made else "read as they were encoded before"
        return kept, report, [f"{len(kept)} rows of {self._source.name} were {verb}: {folder} ({size:.1f} GiB)"]

    def _key(self, fingerprint: str, template: ChatTemplate) -> str:
        settings = {name: getattr(self._settings, name) for name in _FIELDS}
        code = [checksum(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
        content = (self._source.name, fingerprint, self._limit, settings, template.fingerprint(), code)
        return xxhash.xxh3_128_hexdigest(repr(content).encode())

    def _write(self, folder: Path, encoder: Encoder, say: Callable[[str], None]) -> None:
        try:
            remove_abandoned(folder)
            with whole_folder(folder, shared=True) as partial, _all_cores():
                write(partial, self._counted(encoder.groups(self._rows), say))
                report = encoder.report(self._source.name, skip=self._skip)
                (partial / _REPORT).write_text(json.dumps(report.as_json()), encoding="utf-8")
        except OSError as error:
            if not (folder / _REPORT).is_file():  # else another process was faster
                raise UserError(
                    f"the encoded rows cannot be kept in {folder.parent} ({error.strerror}): make room there, or name "
                    "another folder by the environment variable GADCORE_CACHE"
                ) from None

    def _counted(self, groups: Iterable[Group], say: Callable[[str], None]) -> Iterator[Group]:
        began = time.monotonic()
        for count, group in enumerate(groups, 1):
            if time.monotonic() - began > _SILENCE:
                began = time.monotonic()
                say(f"encoding the rows of {self._source.name}, which is done once: {count} so far")
            yield group


@contextmanager
def _all_cores() -> Iterator[None]:
    """Lets the tokenizer use all cores, which it must not while processes are forked."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def write(folder: Path, groups: Iterable[Group]) -> None:
    """Writes groups without samples as EncodedGroups reads them."""
    lengths, keys, digests = array("i"), array("Q"), array("Q")
    with pa.OSFile(str(folder / _ROWS), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        left = iter(groups)
        while batch := list(islice(left, _BATCH)):
            records = [_record(group) for group in batch]
            writer.write_batch(pa.RecordBatch.from_pylist(records, schema=_SCHEMA))
            digests.extend(map(_digest, records))
            for group in batch:
                lengths.extend((len(group.prompt.token_ids), len(group.teacher.token_ids)))
                keys.append(prompt_key(group.prompt.messages))
    index = np.empty(len(keys), _INDEXED)
    index["prompt"], index["response"], index["key"], index["digest"] = lengths[::2], lengths[1::2], keys, digests
    np.save(folder / _INDEX, index)


def remove_abandoned(folder: Path) -> None:
    """Removes what processes that were killed have left of `folder`: gigabytes, perhaps."""
    for left in temporaries(folder.parent, folder.name):
        times = [path.stat().st_mtime for path in (left, *left.iterdir()) if path.exists()]
        if times and max(times) < time.time() - _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _record(group: Group) -> dict[str, Any]:
    return {
        "index": group.prompt.index,
        "messages": json.dumps(group.prompt.messages, ensure_ascii=False),
        "prompt": group.prompt.token_ids,
        "text": group.teacher.text,
        "response": group.teacher.token_ids,
        "finished": group.teacher.finished,
    }


def _digest(record: dict[str, Any]) -> int:
    """64 bits that change with any part of it."""
    messages, text, prompt = record["messages"].encode(), record["text"].encode(), record["prompt"]
    sizes = record["index"], record["finished"], len(messages), len(text), len(prompt)
    ids = np.fromiter((*sizes, *prompt, *record["response"]), dtype=np.int64)
    digest = xxhash.xxh3_64(messages)
    digest.update(text)
    digest.update(ids.tobytes())
    return digest.intdigest()
