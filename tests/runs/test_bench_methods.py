"""`python -m bench methods` on tiny models: its rows, what is left of its runs, and that it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.runs import run


def bench(folder: Path, *more: str) -> tuple[str, list[dict]]:
    """(what was told, rows)"""
    start = [sys.executable, "-m", "bench", "methods", "--quick", "--out", "rows.json", "--work", "work"]
    done = run(
        ["--data", "orders", "--methods", "gad_frozen,gad_plateau", "--budgets", "data", *more], folder, command=start
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, json.loads((folder / "rows.json").read_text())


def test_rows_are_made_once_and_runs_leave_only_their_records(tmp_path) -> None:
    told, rows = bench(tmp_path)
    assert [row["method"] for row in rows] == ["start", "gad_plateau", "gad_frozen"]
    plateau, frozen = rows[1:]
    assert plateau["steps"] == {"sft": 2, "warmup": 1, "gad": 2} == frozen["steps"]
    assert all(seconds > 0 for seconds in plateau["seconds"].values())
    values = plateau["sets"]["held_out"]["right"].split()
    assert len(values) == 6 and set(values) <= {"0", "0.5", "1"}
    assert set(rows[0]["teacher"]) == {"held_out", "elsewhere"}
    left = {path.name for path in (tmp_path / "work/orders-quick/trained/gad_plateau-data-0").iterdir()}
    assert "metrics.jsonl" in left and not left & {"student", "discriminator", "checkpoints", "reference"}
    metrics = (tmp_path / "work/orders-quick/trained/gad_frozen-data-0/metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line).get("discriminator/grad_norm") for line in metrics]
    assert norms[2] is not None and norms[3:] == [None, None]

    told, again = bench(tmp_path)
    assert again == rows and "training" not in told and "sampling" not in told
    # The settings of a kept row are its own: with others it is made anew.
    told, other = bench(tmp_path, "--methods", "gad_plateau", "--student.lr=1e-3")
    assert "gad_plateau-data-0" in told and other[1]["given"] == ["--student.lr=1e-3"]
