"""The sides of the suite `step`, each a process that takes steps on command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from bench import record

# The schedule alone is ours without native ops and without whatever else only makes a CPU faster.
OURS, ALONE, TRL, LITERAL = "ours", "schedule alone", "TRL", "literal"
MODULES = {OURS: "bench.step.ours", ALONE: "bench.step.ours", TRL: "bench.step.trl", LITERAL: "bench.step.literal"}


def native(side: str) -> bool:
    """Whether a side may use native ops and gadcore.cpu."""
    return side != ALONE


def environment(threads: int, *, native: bool = True) -> dict[str, str]:
    """Of a process, before torch is loaded in it. native: with native ops and gadcore.cpu, whatever the caller has."""
    # passive: waiting threads do not take the core that the others work on.
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        # As gadcore.run sets them; here for all sides.
        "GOMP_SPINCOUNT": "2000",
        "THP_MEM_ALLOC_ENABLE": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GADCORE_NO_NATIVE": "0" if native else "1",
    }


class Worker:
    """A side in a process of its own; ready when it is entered."""

    def __init__(
        self, side: str, problem: Path, threads: int, findings: Path, *, process: Sequence[str] | None = None
    ) -> None:
        """process: its module and arguments, where it is no side of MODULES."""
        self.side = side
        arguments = [MODULES[side], str(problem), str(threads), str(findings)] if process is None else process
        command = [sys.executable, "-m", *arguments]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=record.ROOT,
            env=environment(threads, native=native(side)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Worker:
        try:
            self._answer()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-2000:]
        raise RuntimeError(f"the process of {self.side} ended with exit code {code}:\n{said}")
