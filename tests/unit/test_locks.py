"""A lock has one holder, who is named to the next one, and goes with its process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.files import LOCK, held

HOLDER = """
import sys, time
from pathlib import Path
from gadcore.files import held
with held(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


def start(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_the_first_is_until_that_one_dies(tmp_path: Path) -> None:
    path = tmp_path / "made" / LOCK
    process = start(path)
    with pytest.raises(UserError) as told, held(path, "the folder made"):
        pass
    holder = f"process {process.pid} on {socket.gethostname()}"
    assert str(told.value) == f"the folder made is in use by {holder}: wait until it has ended, or stop it"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with held(path, "the folder made"):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not path.exists()


def test_a_process_excludes_itself_too(tmp_path: Path) -> None:
    told = f"x is in use by process {os.getpid()}"
    with held(tmp_path / LOCK, "x"), pytest.raises(UserError, match=told), held(tmp_path / LOCK, "x"):
        pass
    with pytest.raises(ZeroDivisionError), held(tmp_path / LOCK, "x"):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with held(path, "x"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    with held(path, "x"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to("precious")
    with pytest.raises(OSError), held(tmp_path / LOCK, "x"):
        pass
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / LOCK).is_symlink()
