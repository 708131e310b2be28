"""`python -m bench default` on a tiny model: the default job itself behind its rows."""

from __future__ import annotations

import json
import sys

from tests.support.runs import run
from tests.support.tiny import save_tiny


def test_a_row_is_a_run_of_the_default_job_which_is_read_the_second_time(tmp_path) -> None:
    save_tiny(tmp_path / "model")
    start = [sys.executable, "-m", "bench", "default", "--quick", "--out", "rows.json", "--work", "work"]
    # The tiny model has 256 positions.
    given = ["--student.model", str(tmp_path / "model"), "--data.max_prompt_tokens", "200"]
    done = run(given, tmp_path, command=start)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["steps"] == {"sft": 2, "warmup": 1, "gad": 2} and row["seconds"]["total"] > 0
    assert list(row["evaluations"]) == ["before", "after_sft", "after_warmup", "after_gad"]
    assert "GAD made" in row["sentences"][0]
    control = row["control"]
    assert control["temperature"] == 0.9 and set(control["means"]) == set(control["changes"])
    assert {"ROUGE-L", "house style", "length ratio", "words", "distinct-2"} <= set(control["means"])
    made = (tmp_path / "work/seed-0-quick/summary.json").stat().st_mtime_ns
    assert run(given, tmp_path, command=start).returncode == 0
    assert (tmp_path / "work/seed-0-quick/summary.json").stat().st_mtime_ns == made
