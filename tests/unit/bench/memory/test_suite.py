"""What `python -m bench memory` reads from a run, and what docs/measured/memory.md says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record
from bench.memory import suite as memory
from bench.memory import tables

GIB = 2**30


def run_folder(path: Path, held: float, weights: bytes) -> Path:
    """A run of one warmup and three GAD steps; the first GAD step is unlike the others."""
    rows = []
    for stage, factor in (("warmup", 9.0), ("gad", 5.0), ("gad", 1.0), ("gad", 1.0)):
        row = {"stage": stage, "time/total": 10.0 * factor}
        for i, state in enumerate(memory.STATES):
            row |= {
                f"memory/{state}_held": held * factor * GIB,
                f"memory/{state}_resident": 2.0 * factor * GIB,
                f"memory/{state}_peak": (3.0 + i) * factor * GIB,
            }
        rows.append(json.dumps(row))
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(rows))
    for model in ("student", "discriminator"):
        (path / model).mkdir()
        (path / model / "model.safetensors").write_bytes(weights)
    return path


def test_medians_leave_out_the_first_gad_step(tmp_path: Path) -> None:
    row = memory.measured(run_folder(tmp_path / "a", 1.9, b"x"), "none", True)
    assert row["peak_bytes"] == 9 * GIB and row["step_s"] == 10.0
    assert row["ledger_error"] == pytest.approx(0.05)
    assert row["states"]["rollout"] == {"held": int(1.9 * GIB), "resident": 2 * GIB, "peak": 4 * GIB}
    assert row["weights"] != memory.measured(run_folder(tmp_path / "b", 1.9, b"y"), "none", True)["weights"]


def test_the_document_tells_other_weights_and_how_a_limited_run_ends(tmp_path: Path, monkeypatch) -> None:
    rows = [
        memory.measured(run_folder(tmp_path / f"{offload}{shared}", 2.0, weights), offload, shared)
        for offload, shared, weights in (("none", True, b"x"), ("none", False, b"x"), ("file", True, b"z"))
    ]
    rows += [
        {"op": "limited run", "offload": offload, "limit_bytes": 4 * GIB, "finished": offload == "file",
         "exit_code": code, "said": said}
        for offload, code, said in (
            ("none", 2, "gadcore: needs 5 GiB"), ("none", -9, "warning: 6 GiB"), ("file", 0, None)
        )
    ]  # fmt: skip
    path = tmp_path / "memory.json"
    record.write(path, record.stamped("memory", rows))
    monkeypatch.setattr(record, "path_of", lambda suite: path)
    text = tables.document()
    lines = [line for line in text.splitlines() if line.startswith("| stay") or line.startswith("| in files")]
    assert [line.split(" | ")[-1] for line in lines] == ["same |", "same |", "**differ** |"]
    assert "2.00 / 2.00 / 3.00" in lines[0] and "two copies" in lines[1]
    assert "memory.offload = none: the run ends with exit code 2, having said: gadcore: needs 5 GiB." in text
    assert "exit code -9 (killed by the kernel), having said: warning: 6 GiB." in text
    assert "memory.offload = file: the run finishes." in text


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()


def test_what_a_run_said_of_memory_is_told_from_the_rest() -> None:
    out = "status loading\nnote warning: state student needs 5 GiB of 4 GiB allowed (none): plan\nstep 1"
    done = subprocess.CompletedProcess([], -9, out, "Killed\n")
    assert memory._said(done) == "warning: state student needs 5 GiB of 4 GiB allowed (none): plan"
    assert memory._said(subprocess.CompletedProcess([], 0, "step 1", "")) is None


def test_a_control_group_limits_what_runs_in_it() -> None:
    program = "block = bytearray(400 * 2**20); block[::4096] = bytes(len(block[::4096])); print('fits')"
    try:
        with memory.control_group(150 * 2**20) as prefix:
            limited = subprocess.run([*prefix, sys.executable, "-c", program], capture_output=True, text=True)
    except PermissionError as error:
        pytest.skip(f"no control group can be made here: {error}")
    free = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert free.stdout == "fits\n" and limited.stdout == ""
    assert limited.returncode != 0
