"""Locks of folders: one process at a time writes there, and the next one is told who that is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gadcore.errors import UserError

LOCK = ".gadcore-lock"
_held: set[int] = set()


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
