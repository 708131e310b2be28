"""A call in a process of its own: what it returns, what it raises, and how either process ends with the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.evaluate.child import in_process


def test_what_it_returns() -> None:
    assert in_process(divmod, 7, 3) == (2, 1)
    assert in_process(os.getpid) != os.getpid()


def test_what_it_raises() -> None:
    with pytest.raises(UserError, match="^mend it$"):
        in_process(_refuse)
    with pytest.raises(ZeroDivisionError) as caught:
        in_process(divmod, 1, 0)
    assert "Traceback" in caught.value.__notes__[0]


def test_one_that_is_killed() -> None:
    with pytest.raises(UserError, match=r"exit code -9, .* run the same command again"):
        in_process(_kill_itself)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_process_that_waits_for_it(number: int, tmp_path: Path) -> None:
    script = f"from tests.unit.evaluate import test_child as t; t.in_process(t._write_pid, {str(tmp_path / 'pid')!r})"
    waiting = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        # Tests that run in the background may have been started with SIGINT ignored, which their children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child = int(_soon(lambda: (tmp_path / "pid").read_text()))
    waiting.send_signal(number)
    waiting.wait()

    def gone() -> str:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return "yes"
        return ""

    assert _soon(gone)


def _refuse() -> None:
    raise UserError("mend it")


def _kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_pid(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def _soon(find) -> str:
    for _ in range(600):
        try:
            if found := find():
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("nothing happened for a minute")
