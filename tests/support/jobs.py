"""Jobs of several processes as torchrun starts them, of any program; here and by torchrun itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT


@dataclass
class Job:
    """Processes that have the job's store in this one: nobody ends one when another fails, as torchrun would."""

    processes: list[subprocess.Popen[bytes]]
    folder: Path
    store: Any
    began: float = field(default_factory=time.monotonic)

    def output(self, rank: int) -> str:
        return (self.folder / f"output-{rank}").read_text(errors="replace")

    def wait(self, deadline: float) -> list[int | None]:
        """Exit codes by rank; None of one that was still there after `deadline` seconds, which is killed."""
        end = time.monotonic() + deadline
        while time.monotonic() < end and any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        return codes

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)


def start_job(
    size: int, command: Sequence[str], folder: Path, *, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> Job:
    """Python with these arguments, `size` times. folder: for their output."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(size):
        ranked = {
            "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT,
        }  # fmt: skip
        started = os.environ | {key: str(value) for key, value in ranked.items()} | dict(environment or {})
        with (folder / f"output-{rank}").open("wb") as output:
            processes.append(
                subprocess.Popen([sys.executable, *command], cwd=cwd, env=started, stdout=output, stderr=output)
            )
    return Job(processes, folder, store)


def torchrun(
    size: int, arguments: Sequence[str], cwd: Path, *, options: Sequence[str] = (), timeout: float = 560
) -> subprocess.CompletedProcess:
    """torchrun on this machine, of a module or file with arguments; never raises for its exit code."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*start, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
