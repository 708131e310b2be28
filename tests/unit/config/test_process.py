"""Signals and streams of a whole process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gadcore.config.process import ALLOCATOR, SIGNALS, Lasting, StopSignals, set_environment


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    # Whatever the tests were started by ignores.
    kept = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_workspaces_of_products_are_chosen_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in names})
    for chosen, values in ((False, [":4096:8", None]), (True, [":16:8", "1"])):
        set_environment(0, "cuda", batch_invariant=chosen)
        assert [os.environ.get(name) for name in names] == values


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_stops_at_once(number: signal.Signals) -> None:
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signals.reason() == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_a_step_is_finished(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    signals = StopSignals()
    signals.finish_steps()
    assert signals.reason() is None
    os.kill(os.getpid(), number)
    assert signals.reason() == number.name
    assert "finishing the step" in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once() -> None:
    signals = StopSignals()
    signals.finish_steps()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_stays_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signals.reason() is None


def test_a_stream_outlasts_its_reader() -> None:
    reader, writer = os.pipe()
    stream = Lasting(os.fdopen(writer, "w"))
    stream.write("read\n")
    stream.flush()
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        stream.write("lost\n")
        stream.flush()
    # What other code writes to the descriptor itself is lost too, and raises nothing.
    os.write(writer, b"lost\n")
    stream.close()


def test_other_faults_of_a_stream_are_raised() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Lasting(Full()).write("x")


def test_the_program_prints_through_a_terminal_that_was_closed() -> None:
    code = """
import os, pty, sys
from gadcore.config.process import keep_writing
parent, child = pty.openpty()
os.dup2(child, 1); os.close(child)
sys.stdout = os.fdopen(1, "w")
keep_writing()
os.close(parent)
for _ in range(3):
    print("into nothing", flush=True)
os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


def test_a_pipe_that_speaks_ascii_gets_the_numbers_of_other_characters() -> None:
    code = "from gadcore.config.process import keep_writing; keep_writing(); print('Z\u00fcrich')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "Z\\xfcrich\n")


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("auto", {}, "expandable_segments:True"),
        ("cuda", {"PYTORCH_ALLOC_CONF": ""}, "expandable_segments:True"),
        ("cpu", {}, None),
        ("cuda", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_a_gpus_memory_is_joined_unless_the_user_says_something_else(monkeypatch, device, given, expected) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | given)
    set_environment(0, device)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
