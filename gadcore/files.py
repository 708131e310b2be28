"""Files and folders that are whole or not there, and checksums of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xxhash

# Begins the name of a folder that is not whole yet, or no longer.
TEMPORARY = ".tmp-"
_LONGEST_NAME = 120  # file systems take 255 bytes


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


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError for whatever is none, also where it is nested too deep to be read.

    A whole number of more than 18 digits becomes a float, which may be infinite: no figure of ours has as many, and few
    things that are done with figures can take one.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    except RecursionError:
        raise ValueError("nested too deep") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file whole, a line a row. Half of a surrogate pair becomes its JSON escape."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, lines, errors="backslashreplace")


@contextmanager
def whole_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`, to be filled: it becomes `path` as the block ends, and is deleted if that fails.

    shared: other processes may make the same folder now, so each fills one of its own; else there is one name for it,
    and what a killed process left there is replaced.
    Raises OSError where `path` is there by the end of the block, unless it is an empty folder.
    """
    partial = path.with_name(TEMPORARY + path.name + (f"-{uuid.uuid4().hex}" if shared else ""))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_link(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target`; its folder is made. There is the old link or the new one."""
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    os.replace(new, link)


def file_name(text: str) -> str:
    """A name for a file or folder that stands for this text alone, whatever characters it has."""
    name = quote(text, safe="+", errors="backslashreplace").replace("~", "%7E")
    name = "%2E" + name[1:] if name.startswith(".") else name or "%"
    return (
        name
        if len(name) <= _LONGEST_NAME
        else f"{name[:_LONGEST_NAME]}%{hashlib.sha256(repr(text).encode()).hexdigest()[:16]}"
    )


def free_name(path: Path) -> Path:
    """The path, or the first of <path>-2, <path>-3, .. that does not exist."""
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


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
