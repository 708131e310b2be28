"""Code of a file that the user brings along is stopped, in whatever thread it runs, and leaves nothing behind."""

from __future__ import annotations

import threading
import time

import pytest

from gadcore.data.limits import TooLong, limited


def loop(seconds: float) -> None:
    end = time.monotonic() + 20
    with limited(seconds):
        while time.monotonic() < end:
            pass


def test_an_endless_loop_is_stopped() -> None:
    begin = time.monotonic()
    with pytest.raises(TooLong):
        loop(0.05)
    assert time.monotonic() - begin < 10


def test_one_in_another_thread_while_this_one_waits() -> None:
    caught = []

    def run() -> None:
        try:
            loop(0.05)
        except TooLong as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=15)
    assert len(caught) == 1


def test_what_ends_in_time_is_never_disturbed() -> None:
    for _ in range(3):
        with limited(0.15):
            time.sleep(0.01)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
