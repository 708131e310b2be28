"""Files and folders that are whole or not there, or that one process at a time owns, and checksums of files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xxhash

from gadcore.errors import UserError

# Of the file by which a process holds a folder.
LOCK = ".gadcore-lock"
_held: set[int] = set()
# Begins every name that is not final yet, or no longer. 32 hexadecimal digits end it: nobody else has such a name.
TEMPORARY = ".gadcore-"
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY)}(.*)-[0-9a-f]{{32}}", re.DOTALL)
# Of a name in a temporary one: file systems take 255 bytes in all.
_KEPT = 40


def cache_dir() -> Path:
    """Where models and encoded rows are kept: $GADCORE_CACHE, else gadcore/ in $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("GADCORE_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gadcore").expanduser()


def temporary(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    return path.with_name(f"{TEMPORARY}{path.name[:_KEPT]}-{uuid.uuid4().hex}")


def clear_temporaries(folder: Path, name: str | None = None) -> None:
    """Deletes what killed processes left in a folder under temporary names, of all files or of those named `name`.

    For the one process that may write there: what another one is just filling goes too.
    """
    for path in temporaries(folder, name):
        remove(path)


def temporaries(folder: Path, name: str | None = None) -> list[Path]:
    """What has a temporary name in a folder, of all files or of those named `name`."""
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ())]
    return [path for path, match in found if match and (name is None or match[1] == name[:_KEPT])]


def remove(path: Path) -> None:
    """Deletes a file, a link or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_LONGEST_NAME = 120  # file systems take 255 bytes


def write_whole(path: Path, content: str | bytes, *, errors: str = "strict", synced: bool = False) -> None:
    """Writes a file, text as UTF-8; its folder is made. A reader, or a kill, finds the old file or the new one.

    errors: as of str.encode(), for text with half of a surrogate pair, which has no UTF-8.
    synced: the content is on the disk before it takes the old one's place, so that a power cut loses neither.
    Raises OSError that names `path` where it cannot be written.
    """
    data = content.encode(errors=errors) if isinstance(content, str) else content
    partial = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(data)
        if synced:
            sync(partial)
        os.replace(partial, path)
    except OSError as error:
        # The user knows nothing of the temporary name, and a full disk names no file at all.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    if synced:
        sync(path.parent)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError for whatever is none, also where it is nested too deep to be read.

    A whole number of more than 18 digits becomes a float, which may be infinite: no figure of ours has as many, and few
    things that are done with figures can take one.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    except RecursionError:
        raise ValueError("nested too deep") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], *, synced: bool = False) -> None:
    """Writes a JSONL file whole, a line a row. Half of a surrogate pair becomes its JSON escape."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, lines, errors="backslashreplace", synced=synced)


@contextmanager
def whole_folder(path: Path, *, shared: bool = False, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`, to be filled: it becomes `path` as the block ends, and is deleted if that fails.

    Its files are on the disk before it does.
    shared: other processes may make the same folder now; else what a killed process left of it is deleted first.
    replace: it takes the place of a folder that is there, which is deleted then.
    Raises OSError where `path` is there by the end of the block, unless it is an empty folder or replaced.
    """
    if not shared:
        clear_temporaries(path.parent, path.name)
    partial = temporary(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        if replace and path.exists():
            old = temporary(path)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_link(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target`; its folder is made. There is the old link or the new one."""
    link.parent.mkdir(parents=True, exist_ok=True)
    new = temporary(link)
    new.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    try:
        os.replace(new, link)
    finally:
        new.unlink(missing_ok=True)


def file_name(text: str) -> str:
    """A name for a file or folder that stands for this text alone, whatever characters it has."""
    name = quote(text, safe="+", errors="backslashreplace").replace("~", "%7E")
    name = "%2E" + name[1:] if name.startswith(".") else name or "%"
    return (
        name
        if len(name) <= _LONGEST_NAME
        else f"{name[:_LONGEST_NAME]}%{hashlib.sha256(repr(text).encode()).hexdigest()[:16]}"
    )


def free_name(path: Path, ending: str = "") -> Path:
    """<path><ending>, or the first of <path>-2<ending>, <path>-3<ending>, .. that does not exist."""
    candidate, count = path.with_name(path.name + ending), 1
    while os.path.lexists(candidate):
        count += 1
        candidate = path.with_name(f"{path.name}-{count}{ending}")
    return candidate


def sync(path: Path) -> None:
    """Returns when what was written to a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns when the files in a folder, and their names, are on the disk; those of folders inside it too."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_folder(path)
        else:
            sync(path)
    sync(folder)


def checksum(path: Path, algorithm: str = "xxh3_128") -> str:
    """The digest of a file in hexadecimal. algorithm: xxh3_128 against damage, or one that hashlib knows by name."""
    with path.open("rb") as file:
        # hashlib takes what makes a digest as well as a name, which its types do not say.
        return hashlib.file_digest(file, xxhash.xxh3_128 if algorithm == "xxh3_128" else algorithm).hexdigest()  # type: ignore[arg-type]


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path`, whose folder is made, while the block runs; it goes with the process, however that
    ends, and the file is deleted.

    what: that is locked, for the message. Raises UserError with process and host of the holder where there is one.
    """
    descriptor = _acquire(path, what)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        # A forked child holds nothing.
        if descriptor in _held:
            # While it is held: whoever opened it meanwhile sees that it is not the file of this name any more.
            if _is_file(descriptor, path):
                path.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 400, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}): choose a folder on a file system that has locks"
                ) from None
            raise UserError(
                f"{what} is in use by {holder or 'another process'}: wait until it has ended, or stop it"
            ) from None
        if _is_file(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """A fork would keep the lock beyond the process that holds it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
