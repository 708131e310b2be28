"""Learning by adapters beside all weights: what is read of the runs, what is refused, and what the section says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.default import suite as default_job
from bench.learning import suite, tables
from gadcore.errors import UserError
from tests.support import report_runs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run."""
    found: list[list[str]] = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess:
        found.append(arguments)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(default_job.subprocess, "run", run)
    return found


def written(folder: Path, settings: list[str], metrics: list[dict[str, Any]], **evaluations: Any) -> None:
    """A finished run and what it was asked for."""
    report_runs.folder(folder, metrics, evaluations)
    folder.with_name(f"{folder.name}-settings.json").write_text(json.dumps(settings))


def test_a_row_holds_a_value_a_prompt_of_every_stage(tmp_path: Path, calls: list[list[str]]) -> None:
    settings = ["--student.warmup_lr=5e-4"]
    stages = {
        "before": report_runs.answers(0.2, 3, style=0.25),
        "after_sft": report_runs.answers(0.3, 3, style=0.5),
        "after_warmup": report_runs.answers(0.3, 3, style=0.5),
        "after_gad": report_runs.answers(0.4, 3, style=0.75, ngram_f1={"4": 0.125}),
    }
    metrics = report_runs.metrics(gad=6)
    for i, step in enumerate(metrics):
        step["student/kl"] = 0.01 * i
    written(tmp_path / "r16-1", settings, metrics, **stages)
    (tmp_path / "r16-1/checkpoints").mkdir()
    (row,) = suite.run(False, sides=["r16"], seeds=1, first=1, work=tmp_path)
    assert calls == [] and (row["method"], row["seed"], row["settings"]) == ("r16", 1, settings)
    assert list(row["sets"]) == ["before", "after_sft", "after_gad"]
    assert row["sets"]["after_gad"]["style"] == "0.75 0.75 0.75"
    assert row["sets"]["after_gad"]["ngram_f1_4"] == "0.125 0.125 0.125"
    assert row["sets"]["before"]["rouge_l"].split()[0] == "0.2"
    # Of four warmup steps and six of GAD the last four.
    assert row["kl"] == pytest.approx(0.075)
    assert not (tmp_path / "r16-1/checkpoints").exists() and (tmp_path / "r16-1/metrics.jsonl").exists()


def test_the_rates_are_of_the_cross_entropy_alone(tmp_path: Path, calls: list[list[str]]) -> None:
    rows = report_runs.metrics(warmup=2, gad=0)
    rows[1]["heldout/ce"] = 2.51239
    for rate in suite.SIDES["r64"].rates:
        settings = [*suite.CROSS_ENTROPY_ALONE, *suite.SIDES["r64"].given(rate)]
        written(tmp_path / f"r64-{rate}", settings, rows)
    found = list(suite.run(False, sides=["r64"], rates=True, work=tmp_path))
    assert calls == [] and [row["rate"] for row in found] == ["1.25e-4", "2.5e-4", "5e-4"]
    assert {row["seed"] for row in found} == {10} and found[0]["ce"] == {"2": 2.5124}
    assert len({suite.key(row) for row in found}) == 3


def test_a_rate_without_a_look_is_an_error(tmp_path: Path, calls: list[list[str]]) -> None:
    settings = [*suite.CROSS_ENTROPY_ALONE, *suite.SIDES["r64"].given("1.25e-4")]
    written(tmp_path / "r64-1.25e-4", settings, report_runs.metrics(warmup=2, gad=0))
    with pytest.raises(UserError, match="never looked at held-out rows: give a --curriculum.every within its steps"):
        next(suite.run(False, sides=["r64"], rates=True, work=tmp_path))


def test_a_side_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no side r8: there are full, r16, r64, r16-both"):
        next(suite.run(False, sides=["full", "r8"], work=tmp_path))


def test_a_run_without_the_evaluations_is_an_error(tmp_path: Path, calls: list[list[str]]) -> None:
    settings = suite.SIDES["full"].given("5e-5")
    written(tmp_path / "full-0", settings, report_runs.metrics(), before=report_runs.answers(0.2))
    with pytest.raises(UserError, match="full-0 holds no finished run with evaluations: delete it"):
        next(suite.run(False, sides=["full"], work=tmp_path))


def test_the_sides_differ_in_what_they_are_said_to() -> None:
    """All by the default job's own settings, which have rank 16; every rate that is used was tried."""
    assert not suite.SIDES["r16"].settings and "--student.adapter=none" in suite.SIDES["full"].settings
    assert all(side.rate in side.rates for side in suite.SIDES.values() if side.rates)
    assert suite.SIDES["r16-both"].rate == suite.SIDES["r16"].rate
    for side in (suite.SIDES["full"], suite.SIDES["r64"]):
        (of_gad,) = (value for given in side.settings for name, value in [given.split("=")] if name == "--student.lr")
        assert float(of_gad) == pytest.approx(float(side.rate) / 5)


def row(side: str, seed: int, style: str) -> dict[str, Any]:
    sets = {stage: {"style": style if stage != "before" else "0 0 0"} for stage in suite.STAGES}
    return {"method": side, "seed": seed, "settings": [], "sets": sets, "kl": 0.004, "seconds": {"total": 600.0}}


def test_the_section_holds_every_side_against_all_weights() -> None:
    rows = [
        *(row("full", seed, "0.5 0.5 0.5") for seed in (0, 1)),
        row("r16", 0, "0.7 0.7 0.7"),
        row("r16", 1, "0.7 0.7 0.702"),
        row("r64", 1, "0.5 0.6 0.4"),
    ]
    text = "\n\n".join(tables.blocks(rows))
    assert "`r16` better (+0.200 [" in text and "± 0.004, 2 seeds)" in text
    assert "`r64` no difference shown (+0.000 [-0.100, +0.100], 1 seed)" in text
    lines = text.splitlines()
    assert sum(line.startswith("| r16 - full | +0.200 [") for line in lines) == 2
    assert any(line.startswith("| full | 2 | 10 | 0.500 [0.500, 0.500]") for line in lines)
    assert any(line.startswith("| full | 2 | 10 | 0.0040 | 0.500 [0.500, 0.500]") for line in lines)
    assert not any(line.startswith("| r16-both") for line in lines)


def test_the_section_has_the_rates_that_were_tried() -> None:
    rates = [{"method": "r16", "seed": 10, "rate": rate, "ce": {"20": 2.5, "40": ce}} for rate, ce in (("5e-4", 2.25),)]
    text = "\n\n".join(tables.blocks(rates))
    assert "| side | learning rate | after step 20 | after step 40 |" in text
    assert "| r16 | 5e-4 | 2.500 | 2.250 |" in text
    assert "After GAD" not in text


def test_without_rows_it_says_so() -> None:
    assert "Not run" in "\n".join(tables.blocks([]))
