"""Memory of a run by state: holdings that stay or wait in files, weights shared or not; and a run under a limit.

Every row is a run of its own, `python -m gadcore.run` with the default job's models and sizes and fewer steps. Runs
are interleaved with nothing: memory does not vary as times do; their seconds are told, as the price of moving.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench import record
from gadcore.memory.holdings import NEEDS

STATES = tuple(state for state in NEEDS if state != "rest")
WAYS = tuple((offload, shared) for offload in ("none", "file") for shared in (True, False))
STEPS = {"schedule.warmup_steps": 1, "schedule.gad_steps": 2, "data.eval": "none", "checkpoint.every": 0}
CGROUPS = Path("/sys/fs/cgroup")


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A row a run, as soon as it is there. quick: one step of each stage."""
    steps = STEPS | ({"schedule.gad_steps": 1} if quick else {})
    settings = [*(str(item) for key, value in steps.items() for item in (f"--{key}", value))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for offload, shared in WAYS:
            ways = ["--memory.offload", offload, "--memory.shared_weights", str(shared).lower()]
            path = Path(folder) / f"{offload}-{shared}"
            done = start([*settings, *ways, "--run.dir", str(path)], Path(folder))
            if done.returncode:
                raise RuntimeError(f"the run with {' '.join(ways)} ended with {done.returncode}: {done.stderr[-500:]}")
            rows.append(measured(path, offload, shared))
            same = rows[-1]["weights"] == rows[0]["weights"]
            yield {**rows[-1], "gate": "pass" if same and rows[-1]["ledger_error"] <= 0.05 else "fail"}
            shutil.rmtree(path)
        yield from limited(settings, rows, Path(folder))


def start(arguments: list[str], folder: Path, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(prefix or []), sys.executable, "-m", "gadcore.run", *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(record.ROOT), os.environ.get("PYTHONPATH", "")])}
    record.say(" ".join(command[-8:]))
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def measured(path: Path, offload: str, shared: bool) -> dict[str, Any]:
    """Medians over the GAD steps of a finished run, but the first: there the optimizer's moments are made."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if row["stage"] == "gad"]
    steps = steps[1:] or steps
    states = {
        state: {
            what: int(median(row[f"memory/{state}_{what}"] for row in steps)) for what in ("held", "resident", "peak")
        }
        for state in STATES
        if all(f"memory/{state}_peak" in row for row in steps)
    }
    weights = hashlib.sha256()
    for model in ("student", "discriminator"):
        weights.update((path / model / "model.safetensors").read_bytes())
    return {
        "op": "run",
        "offload": offload,
        "shared_weights": shared,
        "states": states,
        "peak_bytes": max(state["peak"] for state in states.values()),
        # Of what is resident when a state ends: its activations are gone then, its holdings are not.
        "ledger_error": max(abs(s["held"] / s["resident"] - 1) for s in states.values()),
        "moving_s": median(row.get("memory/moving_s", 0.0) for row in steps),
        "step_s": median(row["time/total"] for row in steps),
        "weights": weights.hexdigest()[:16],
    }


def limited(settings: list[str], rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """The same run under a control group's limit between the peaks with and without files."""
    without, with_files = (next(r["peak_bytes"] for r in rows if r["offload"] == o) for o in ("none", "file"))
    limit = (without + with_files) // 2
    try:
        with control_group(limit) as prefix:
            for offload in ("none", "file"):
                path = folder / f"limited-{offload}"
                done = start([*settings, "--memory.offload", offload, "--run.dir", str(path)], folder, prefix)
                finished = (path / "summary.json").exists()
                yield {
                    "op": "limited run",
                    "offload": offload,
                    "limit_bytes": limit,
                    "finished": finished,
                    "exit_code": done.returncode,
                    "said": _said(done),
                    "gate": "pass" if finished == (offload == "file") else "fail",
                }
                shutil.rmtree(path, ignore_errors=True)
    except PermissionError as error:
        record.say(f"no run under a limit: a control group cannot be made here ({error})")


def _said(done: subprocess.CompletedProcess[str]) -> str | None:
    """What the run said of memory last."""
    found = re.findall(r"(?:warning|gadcore): .* GiB allowed.*", f"{done.stdout}\n{done.stderr}")
    return found[-1] if found else None


@contextmanager
def control_group(limit: int) -> Iterator[list[str]]:
    """A command prefix that runs what follows with at most `limit` bytes; PermissionError where that is not allowed."""
    version_1 = (CGROUPS / "memory").is_dir()
    group = CGROUPS / ("memory" if version_1 else "") / f"gadcore-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise PermissionError(str(error)) from error
    try:
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    except OSError as error:
        raise PermissionError(str(error)) from error
    finally:
        group.rmdir()
