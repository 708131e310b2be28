"""`python -m bench real` on tiny runs: its rows, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.paper import real, real_text
from gadcore.errors import UserError
from gadcore.evaluate.responses import read_responses
from gadcore.measure.intervals import difference
from gadcore.measure.likeness import words
from tests.support.runs import records, run, tiny_arguments


@pytest.fixture(scope="module")
def trained(module_folder: Path) -> Path:
    """A folder with the runs gad (checkpoints 2, 3, 4, 6, 7) and seqkd (2, 3)."""
    for name, start in (("gad", []), ("seqkd", ["seqkd"])):
        done = run([*start, *tiny_arguments(module_folder), "--run.dir", name, "--checkpoint.keep", "9"], module_folder)
        assert done.returncode == 0, done.stderr
    return module_folder


def bench(trained: Path, *more: str) -> tuple[int, str, list[dict]]:
    """(exit code, what was told, rows)"""
    start = [sys.executable, "-m", "bench", "real", "gad", "seqkd", "--quick", "--out", "rows.json"]
    done = run(["--steps", "3,7", "--eval.out", "work", *more], trained, command=start)
    return done.returncode, done.stdout + done.stderr, json.loads((trained / "rows.json").read_text())


def test_points_are_measured_and_compared_at_equal_compute(trained) -> None:
    code, told, rows = bench(trained)
    assert code == 0, told
    assert [(row["run"], row["step"]) for row in rows[:3]] == [("start", 0), ("gad", 3), ("gad", 7)]
    seqkd = {row["step"] for row in rows[3:] if row["run"] == "seqkd"}
    assert len(rows) == 3 + len(seqkd) and seqkd <= {2, 3}
    lines = [json.loads(line) for line in (trained / "gad/metrics.jsonl").read_text().splitlines()]
    assert rows[1]["seconds"] == pytest.approx(sum(line.get(p, 0.0) for line in lines[:3] for p in real.PHASES))
    assert rows[2]["training"]["steps"] == {"warmup": 3, "gad": 4}

    mine, other = (read_responses(trained / f"work/held_out/{name}.jsonl") for name in ("gad-000007", "seqkd-000003"))
    counts = [[float(len(words(row.response))) for row in each] for each in (mine, other)]
    assert rows[2]["measures"]["words"]["mean"] == pytest.approx(sum(counts[0]) / 4)
    beside = rows[2]["beside"]["seqkd"]
    assert beside["step"] == 3
    expected = difference(counts[1], counts[0], resamples=50)
    assert beside["differences"]["words"]["mean"] == pytest.approx(expected.mean)
    assert set(beside["differences"]) == set(rows[2]["measures"])
    assert rows[0]["prompts"] == 4 and rows[0]["settings"]["fresh"]["steps"] == 2
    assert str(trained) not in json.dumps(rows)

    text = "\n".join(real_text.section(rows))
    assert "3 of warmup and 4 of gad steps of 4 prompts" in text and "| gad | 7 |" in text
    assert set(real_text.drawings(rows)) == {
        f"findings-real-{name}.svg" for name in ("fresh-accuracy", "ngram-f1-1", "ngram-f1-4", "words")
    }

    code, told, again = bench(trained)
    assert code == 0 and again == rows
    assert "sampling" not in told and "tells" not in told


def test_other_settings_of_a_run_are_refused(trained, tmp_path, capsys) -> None:
    other = Path(shutil.copytree(trained / "seqkd", tmp_path / "seqkd"))
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(config.replace("\nbatch_size = 4\n", "\nbatch_size = 5\n"))
    assert command.main(["real", str(trained / "gad"), str(other)]) == 2
    assert "schedule.batch_size is 4 in the first run and 5" in capsys.readouterr().err
    assert command.main(["real", str(trained / "gad"), str(trained / "gad")]) == 2
    assert "must be of different methods, these are gad, gad" in capsys.readouterr().err
    assert command.main(["real", str(trained / "gad"), "--steps", "5"]) == 2
    assert "no checkpoint of step 5: there are 2, 3, 4, 6, 7" in capsys.readouterr().err
    (other / "config.toml").write_text(config.replace(f'eval = "{trained / "rows.jsonl"}"', 'eval = "none"'))
    with pytest.raises(UserError, match="names no held-out rows"):
        real.read(other)
    shutil.rmtree(other / "checkpoints")
    (other / "config.toml").write_text(config)
    with pytest.raises(UserError, match="has no checkpoints: train with checkpoint.every"):
        real.read(other)


def test_a_run_that_goes_on_is_read_as_far_as_it_is_whole(trained, tmp_path) -> None:
    growing = Path(shutil.copytree(trained / "gad", tmp_path / "gad"))
    lines = (growing / "metrics.jsonl").read_text().splitlines()
    (growing / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])
    found = real.read(growing)
    assert [point.step for point in found.points] == [2, 3, 4] and found.lasted == {"warmup": 3, "gad": 1}
    whole = real.read(trained / "gad")
    assert found.points[2].seconds == whole.points[2].seconds < whole.points[3].seconds
    assert len(records(trained / "gad")) == 7 == whole.points[-1].step
