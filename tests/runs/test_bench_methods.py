"""`python -m bench methods` on tiny models: gadcore's own commands behind its rows."""

from __future__ import annotations

import json
import sys

from tests.support.runs import run


def test_a_row_is_trained_and_measured_by_gadcores_commands(tmp_path) -> None:
    start = [sys.executable, "-m", "bench", "methods", "--quick", "--out", "rows.json", "--work", "work"]
    done = run(["--data", "manners", "--methods", "gad_frozen", "--budgets", "data"], tmp_path, command=start)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["start", "gad_frozen"]
    assert rows[1]["steps"] == {"sft": 2, "warmup": 1, "gad": 2}
    assert all(seconds > 0 for seconds in rows[1]["seconds"].values())
    values = rows[1]["sets"]["held_out"]["right"].split()
    assert len(values) == 6 and set(values) <= {"0", "0.5", "1"}
    assert set(rows[0]["teacher"]) == {"held_out", "elsewhere"}
    left = {path.name for path in (tmp_path / "work/manners-quick/trained/gad_frozen-data-0").iterdir()}
    assert "metrics.jsonl" in left and not left & {"student", "discriminator", "checkpoints", "reference"}
    metrics = (tmp_path / "work/manners-quick/trained/gad_frozen-data-0/metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line).get("discriminator/grad_norm") for line in metrics]
    assert norms[2] is not None and norms[3:] == [None, None]
