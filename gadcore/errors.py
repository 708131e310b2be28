"""The two ways in which a run ends early on purpose, and the one door through which other people's exceptions come."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# What the exceptions of most libraries are: their text says enough. Of others the type is part of what they say.
_SPEAKING = (OSError, ValueError, RuntimeError)
_LONGEST = 400


class UserError(Exception):
    """Bad input: a file, a row, a setting or a folder that the user can mend.

    The message is one sentence that names the file, line, key or value and says what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived: the step was finished and saved. The message says how to go on."""


def is_users(error: OSError) -> bool:
    """Whether a full disk (which names no file) or a file or folder that cannot be used is the user's to mend."""
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def cause(error: BaseException) -> str:
    """All that an exception says, in one line of at most some 400 characters."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if isinstance(error, KeyError) or not isinstance(error, _SPEAKING):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} .."


@contextmanager
def foreign(what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever code of others raises inside, on input of the user, into a UserError: `what`, the cause, `advice`.

    A UserError passes as it is, and so do a full memory and what stops a process. advice: what to do, after a colon.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # A panic of a library in Rust (tokenizers) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {cause(error)}{f': {advice}' if advice else ''}") from error
