"""The discriminator service over tiny models, in this process or as one of its own, and what its clients ask for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gadcore.integrations.client import DiscriminatorClient
from tests.support.runs import ROOT, write_rows
from tests.support.tiny import save_tiny


def settings(folder: Path, **changed: Any) -> dict[str, dict[str, Any]]:
    """Sections of a service over a tiny model and ten rows, made in `folder`. changed: section__name."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
        write_rows(folder / "rows.jsonl")
    sections: dict[str, dict[str, Any]] = {
        "discriminator": {"model": str(folder / "model"), "lr": 1e-4},
        "data": {"train": str(folder / "rows.jsonl")},
        "service": {"dir": str(folder / "service"), "port": 0, "checkpoint_every": 5},
        "run": {"device": "cpu", "seed": 3},
    }
    for key, value in changed.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return sections


@contextmanager
def running(sections: dict[str, dict[str, Any]], token: str | None = None) -> Iterator[tuple[str, Any]]:
    """The service in threads of this process: (its address, its worker). It is stopped as by a signal."""
    from gadcore.integrations.service.command import start
    from gadcore.integrations.service.settings import ServiceConfig

    config = ServiceConfig.model_validate(sections)
    server, worker, _ = start(config, token)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", worker
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class ServiceProcess:
    """`python -m gadcore.run serve-discriminator` at one port, to be killed and started again."""

    def __init__(self, folder: Path, sections: dict[str, dict[str, Any]]) -> None:
        self.port = free_port()
        sections["service"]["port"] = self.port
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "service.log"
        self.folder = folder
        flags = [(f"--{section}.{name}", str(v)) for section, of in sections.items() for name, v in of.items()]
        self._command = [
            sys.executable,
            "-m",
            "gadcore.run",
            "serve-discriminator",
            *(w for pair in flags for w in pair),
        ]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process: subprocess.Popen | None = None
        self.starts = 0

    def start(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=subprocess.STDOUT)
        self.starts += 1

    def wait_until_ready(self, seconds: float = 120) -> None:
        client = DiscriminatorClient(self.url, token="")
        end = time.monotonic() + seconds
        while True:
            assert self.process is not None and self.process.poll() is None, self.said()
            try:
                client.health()
                return
            except Exception:
                assert time.monotonic() < end, self.said()
                time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(90)

    def said(self) -> str:
        return self._log.read_text()
