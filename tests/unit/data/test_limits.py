"""Code of a file that the user brings along is stopped, in whatever thread it runs, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from gadcore.data import rendering
from gadcore.data.limits import TooLarge, TooLong, limited, tried
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from tests.support.tiny import CHATML, tiny_tokenizer


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


# What cannot be stopped here is tried in a copy of this process

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited on Linux alone")


def boom() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("work", [lambda: None, boom, lambda: sys.exit(5)])
def test_what_is_tried_may_do_what_it_likes(work: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> None:
    children = psutil.Process().children()
    tried(work, seconds=10, memory=64 << 20)
    assert psutil.Process().children() == children
    assert capfd.readouterr() == ("", "")


@ONLY_LINUX
@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda: "a" * 10**9, TooLarge),
        (lambda: [object() for _ in range(10**8)], TooLarge),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), TooLarge),
        # One operation, which nothing in this process would stop.
        (lambda: 7 ** (7**12), TooLong),
    ],
)
def test_too_much_memory_or_time_ends_the_copy_alone(work: Callable[[], object], error: type[Exception]) -> None:
    children, begin = psutil.Process().children(), time.monotonic()
    with pytest.raises(error):
        tried(work, seconds=0.5 if error is TooLong else 20, memory=64 << 20)
    assert time.monotonic() - begin < 15
    assert psutil.Process().children() == children


@ONLY_LINUX
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 'a' * 10**10 }}", "takes more than 512 MiB of memory"),
        ("{% set n = 10**9 %}{{ messages[0].content | indent(n) }}", "takes more than 512 MiB of memory"),
        (
            "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "takes more than 512 MiB of memory",
        ),
        ("{{ 7 ** (7 ** 12) }}", "was not done with a conversation after 1 s"),
        ("{{ 'a' * 2000000 }}", "makes 2000000 characters of a conversation that has"),
    ],
)
def test_a_chat_template_that_asks_for_too_much_is_told(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "_SECONDS", 1.0 if "not done" in words else 20.0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source + CHATML if "makes" not in words else source
    with pytest.raises(UserError) as caught:
        ChatTemplate(tokenizer)
    assert words in str(caught.value) and "\n" not in str(caught.value)
