"""The two ways in which a run ends early on purpose."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a file, a row, a setting or a folder that the user can mend.

    The message is one sentence that names the file, line, key or value and says what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived: the step was finished and saved. The message says how to go on."""
