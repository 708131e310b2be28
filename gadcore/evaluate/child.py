"""A call in a process of its own, which gives back all that it took of a device as it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from gadcore.errors import UserError

# What a process that has said its result may take to end by itself.
_ENDING_S = 60


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns or raises what the function does, called in a new process; all of it has to be picklable.

    The process ends when this one is stopped, or ends in any other way. Raises UserError where the process is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    # Else it would stay open when the process is gone.
    sender.close()
    try:
        error, value = receiver.recv()
        process.join(_ENDING_S)
    except EOFError:
        process.join()
        raise UserError(
            f"a process of eval ended before it was done (exit code {process.exitcode}, where -9 is mostly a lack of "
            "memory): run the same command again, it goes on from what was written"
        ) from None
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if error is not None:
        raise error
    return value


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C in a terminal reaches this process as well; the other one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send((None, function(*arguments)))
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(f"in a process of its own:\n{traceback.format_exc()}")
        sender.send((error, None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
