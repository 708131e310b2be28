"""doctor-d on a run's folder: finished, with a checkpoint alone, without what it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gadcore.run import main
from tests.support.runs import tiny_arguments


@pytest.fixture(scope="module")
def run(module_folder: Path) -> Path:
    arguments = [*tiny_arguments(module_folder), "--run.dir", str(module_folder / "run"), "--data.eval_samples", "2"]
    short = ["--schedule.warmup_steps", "2", "--schedule.gad_steps", "1", "--tracking.monitor_interval", "0"]
    assert main([*arguments, *short, "--convergence.steps", "2", "--convergence.step_rows", "2"]) == 0
    return module_folder / "run"


def test_a_report_has_the_checks_that_need_no_model(run) -> None:
    page = (run / "report.html").read_text()
    assert 'id="discriminator"' in page and "The command doctor-d asks the model itself, too." in page
    assert "identical text" not in page


def test_the_command_asks_the_model_too(run, capsys) -> None:
    code = main(["doctor-d", str(run), "--noise"])
    said = capsys.readouterr().out
    assert "identical text  One text gets one score, whoever wrote it." in said
    assert "Two discriminators of other seeds" in said or "reward noise" not in said
    kept = json.loads((run / "doctor-d.json").read_text())
    assert kept["evaluation"] == "after_gad" and 0 <= kept["model"]["identical"] < 1e-2
    assert kept["model"]["end_marker"] > 0 and kept["model"]["trained"] is not None
    # Random models on a few rows: something is wrong, and the last line says what.
    assert code == 1 and "rewards are not to be trusted" in said
    page = (run / "report.html").read_text()
    assert "One text gets one score" in page and "asks the model itself" not in page


def test_a_run_that_has_not_finished_is_asked_by_its_checkpoint(run, tmp_path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/discriminator")
    (tmp_path / "run/summary.json").unlink()
    assert main(["doctor-d", str(tmp_path / "run")]) in (0, 1)
    assert "One text gets one score" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob(".gadcore-*"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert main(["doctor-d", str(tmp_path / "run")]) == 2
    assert "has no discriminator and no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is no run folder (it has no config.toml)"),
        (["one", "two"], "doctor-d takes a run folder, and --noise, not one two"),
        (["--nois"], "doctor-d takes a run folder, and --noise, not --nois"),
    ],
)
def test_what_it_is_not_given(arguments, sentence, capsys) -> None:
    assert main(["doctor-d", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_without_samples_and_rows_that_changed(run, tmp_path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = (tmp_path / "run/config.toml").read_text()
    (tmp_path / "run/config.toml").write_text(config.replace("eval_rows = 4", "eval_rows = 3"))
    assert main(["doctor-d", str(tmp_path / "run")]) == 2
    assert "was evaluated on 4 held-out rows" in capsys.readouterr().err
    for path in (tmp_path / "run/evaluations").iterdir():
        path.write_text('{"prompt": "a", "teacher": "b", "student": "c", "rouge_l": 0.1, "length_ratio": 1.0}\n')
    assert main(["doctor-d", str(tmp_path / "run")]) == 2
    assert "has no held-out evaluation with samples and a discriminator's scores of them" in capsys.readouterr().err
