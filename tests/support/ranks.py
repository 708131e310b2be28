"""Several processes over gloo, as torchrun starts them: a function runs in each, and its results come back.

    results = run_ranks(2, "tests.unit.distributed.test_world:collectives", argument, deadline=60)

The function gets the World first; it is imported anew in every process.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LAST_LINES = 40


def run_ranks(
    size: int,
    function: str,
    *args: Any,
    deadline: float = 120.0,
    replicas: int = 1,
    per_node: int | None = None,
    environment: dict[str, str] | None = None,
    device: str = "cpu",
    timeout_s: float = 60.0,
) -> list[Any]:
    """What `function` ("module:name") returns in each of `size` processes, by rank.

    AssertionError with the ends of the failed processes' output where one fails; those that are left after `deadline`
    seconds, or after one has failed, are killed. per_node: processes of a node, default all. device: "cpu", or "cuda",
    a GPU each. timeout_s: of a collective.
    """
    from torch.distributed import TCPStore

    # Here, and not in the first process: its port is known before anyone is started, and nobody can take it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline))
    per_node = per_node or size
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "args").write_bytes(pickle.dumps((function, args, replicas, device, timeout_s)))
        running = []
        for rank in range(size):
            ranked = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT,
            }  # fmt: skip
            started = os.environ | {key: str(value) for key, value in ranked.items()} | (environment or {})
            with (folder / f"output-{rank}").open("wb") as output:
                command = [sys.executable, "-m", "tests.support.ranks", name]
                running.append(subprocess.Popen(command, cwd=ROOT, env=started, stdout=output, stderr=output))
        _wait(running, folder, deadline)
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]


def _wait(running: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    end = time.monotonic() + deadline
    try:
        while any(process.poll() is None for process in running):
            failed = any(process.poll() for process in running)
            if failed or time.monotonic() > end:
                # The others tell in a moment what they have seen of it.
                time.sleep(2 if failed else 0)
                break
            time.sleep(0.05)
        codes = [process.poll() for process in running]
        if any(code != 0 for code in codes):
            told = [f"exit codes {codes} (None: killed after {deadline} s)"]
            for rank in range(len(running)):
                lines = (folder / f"output-{rank}").read_text(errors="replace").splitlines()
                told += [f"--- rank {rank}", *lines[-_LAST_LINES:]]
            raise AssertionError("\n".join(told))
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def main(folder: Path) -> None:
    """One of the processes."""
    import torch

    from gadcore.distributed.world import join_world

    torch.set_num_threads(1)
    function, args, replicas, device, timeout_s = pickle.loads((folder / "args").read_bytes())
    module, name = function.split(":")
    with join_world(torch.device(device), timeout_s=timeout_s, replicas=replicas) as world:
        result = getattr(importlib.import_module(module), name)(world, *args)
        (folder / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
        # Who leaves early takes the connections with him.
        world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
