"""vLLM's OpenAI server on loopback, as `gadcore serve` starts it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    # Whatever an engine in the tests' own process has set: the log is read.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_HOST_IP": "127.0.0.1",
}
STARTS_WITHIN_S = 240


class VllmServer:
    """A running server of the model in a directory, by the name "tiny"; a context manager.

    accesses(): requests for chat completions in the server's own access log, by their HTTP status.
    """

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base_url, self._log = f"http://127.0.0.1:{port}/v1", log
        arguments = [
            str(model), "--name", "tiny", "--port", str(port), "--",
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8",
            "--enable-log-requests",
        ]  # fmt: skip
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gadcore", "serve", *arguments],
                env=os.environ | ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> VllmServer:
        end = time.monotonic() + STARTS_WITHIN_S
        health = self.base_url.removesuffix("/v1") + "/health"
        while True:
            try:
                urllib.request.urlopen(health, timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise RuntimeError(f"vLLM did not start:\n{self.log()[-4000:]}") from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        # By SIGTERM the server takes its engine process down with it.
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def accesses(self) -> list[str]:
        return re.findall(r'"POST /v1/chat/completions HTTP/1\.1" (\d+)', self.log())

    def received(self) -> int:
        """Requests that reached the engine, also those whose client had gone before the answer."""
        return len(re.findall(r"Received request chatcmpl-", self.log()))
