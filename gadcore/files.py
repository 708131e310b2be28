"""Files and folders that are whole or not there, and checksums of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash


def write_whole(path: Path, content: str | bytes, *, errors: str = "strict", synced: bool = False) -> None:
    """Writes a file, text as UTF-8; its folder is made. A reader, or a kill, finds the old file or the new one.

    errors: as of str.encode(), for text with half of a surrogate pair, which has no UTF-8.
    synced: the content is on the disk before it takes the old one's place, so that a power cut loses neither.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode(errors=errors) if isinstance(content, str) else content)
    if synced:
        sync(partial)
    os.replace(partial, path)


@contextmanager
def whole_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`, to be filled: it becomes `path` as the block ends, and is deleted if that fails.

    shared: other processes may make the same folder now, so each fills one of its own; else there is one name for it,
    and what a killed process left there is replaced.
    Raises OSError where `path` is there by the end of the block, unless it is an empty folder.
    """
    partial = path.with_name(f"{path.name}.partial" + (f"-{uuid.uuid4().hex}" if shared else ""))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Returns when what was written to a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path, algorithm: str = "xxh3_128") -> str:
    """The digest of a file in hexadecimal. algorithm: xxh3_128 against damage, or one that hashlib knows by name."""
    with path.open("rb") as file:
        # hashlib takes what makes a digest as well as a name, which its types do not say.
        return hashlib.file_digest(file, xxhash.xxh3_128 if algorithm == "xxh3_128" else algorithm).hexdigest()  # type: ignore[arg-type]
