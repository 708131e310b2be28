"""What ends one process of several is told by all means, also where torchrun stops it meanwhile."""

from __future__ import annotations

import os
import signal

import pytest

from gadcore import run
from gadcore.config.process import SIGNALS, StopSignals
from gadcore.distributed.watch import Watch


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_signal_meanwhile_changes_neither_the_sentence_nor_the_code(monkeypatch) -> None:
    class Told:
        def told(self, text: str, code: int) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return code

    monkeypatch.setattr(run, "several_processes", lambda: True)
    monkeypatch.setattr(Watch, "join", Told)
    StopSignals()
    assert run._told("data.train: no such file", 2) == 2
