"""`python -m bench learning` on a tiny model: runs of the default job behind its rows."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.runs import run
from tests.support.tiny import save_tiny


@pytest.mark.parametrize("rates", [False, True])
def test_a_row_is_a_run_under_the_sides_settings(rates: bool, tmp_path) -> None:
    save_tiny(tmp_path / "model")
    start = [sys.executable, "-m", "bench", "learning", "--quick", "--out", "rows.json", "--work", "work"]
    # The tiny model has 256 positions.
    given = ["--student.model", str(tmp_path / "model"), "--data.max_prompt_tokens", "200"]
    given += ["--sides", "r16", "--rates", "--curriculum.every=2"] if rates else ["--sides", "r16-both"]
    done = run(given, tmp_path, command=start)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    if rates:
        assert [list(row["ce"]) for row in rows] == [["2"]] * 3 and all(row["ce"]["2"] > 0 for row in rows)
        assert len({row["ce"]["2"] for row in rows}) == 3
        return
    assert {len(values.split()) for of in rows[0]["sets"].values() for values in of.values()} == {4}
    assert {"rouge_l", "style", "repeated", "ngram_f1_4"} <= set(rows[0]["sets"]["after_gad"])
    config = (tmp_path / "work/quick/r16-both-0/config.toml").read_text()
    assert config.count('adapter = "lora"') == 2
    assert not (tmp_path / "work/quick/r16-both-0/checkpoints").exists()
