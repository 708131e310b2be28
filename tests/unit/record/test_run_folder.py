"""The run folder: made, refused, found again, and written to in whole files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gadcore.config.loading import load
from gadcore.config.settings import Config, RunSettings, ScheduleSettings
from gadcore.errors import UserError
from gadcore.record.run_folder import LATEST, RUNS, RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(directory: Path | str | None = None, name: str = "gad") -> Config:
    return Config(run=RunSettings(name=name, dir=None if directory is None else str(directory)))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_holds_the_config_and_is_the_latest() -> None:
    folder = RunFolder.create(config(name="trial"))
    assert folder.path.parent == RUNS and folder.path.name.startswith("trial-")
    assert os.listdir(folder.path) == ["config.toml"]
    assert LATEST.is_symlink() and LATEST.resolve() == folder.path.resolve()
    assert folder.checkpoints == folder.path / "checkpoints" and folder.reference == folder.path / "reference"


def test_the_config_comes_back_equal() -> None:
    made = Config(
        run=RunSettings(name='a "quoted" näme\n', dir="some where/else", seed=3),
        schedule=ScheduleSettings(gad_steps=5, warmup_steps=None),
    )
    folder = RunFolder.create(made)
    # Without the folder: fed back, the settings start a run of their own.
    assert load(["--config", str(folder.path / "config.toml"), "--run.dir", "some where/else"]) == made
    assert load(["--config", str(folder.path / "config.toml")]).run.dir is None


def test_two_runs_of_one_second_get_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20250102-030405")
    names = [RunFolder.create(config()).path.name for _ in range(3)]
    assert names == ["gad-20250102-030405", "gad-20250102-030405-2", "gad-20250102-030405-3"]
    assert LATEST.resolve().name == names[-1]


def test_a_folder_of_another_run_is_refused_untouched(here: Path) -> None:
    RunFolder.create(config(here / "mine"))
    newer = RunFolder.create(config(here / "newer"))
    before = snapshot(here / "mine")
    with pytest.raises(UserError, match=r"mine already holds another run: .*run\.dir.*--resume auto"):
        RunFolder.create(config(here / "mine", name="other"))
    assert snapshot(here / "mine") == before
    assert LATEST.resolve() == newer.path.resolve()


def test_an_empty_folder_may_be_there_already(here: Path) -> None:
    (here / "deep/mine").mkdir(parents=True)
    assert RunFolder.create(config("deep/mine")).path == Path("deep/mine")


def test_the_latest_link_survives_a_move_of_the_whole_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    folder = RunFolder.create(config())
    monkeypatch.chdir(here)
    (here / "work").rename(here / "moved")
    monkeypatch.chdir(here / "moved")
    assert RunFolder.existing(None).path.name == folder.path.name


def test_the_latest_link_points_out_of_runs_too(here: Path) -> None:
    RunFolder.create(config(here / "elsewhere"))
    assert LATEST.resolve() == (here / "elsewhere").resolve()
    assert sorted(os.listdir(RUNS)) == ["latest"]


def test_a_dangling_latest_link_is_replaced() -> None:
    RUNS.mkdir()
    LATEST.symlink_to("gone")
    folder = RunFolder.create(config())
    assert LATEST.resolve() == folder.path.resolve()


def test_something_else_named_latest_is_left_alone() -> None:
    LATEST.mkdir(parents=True)
    (LATEST / "note").write_text("mine")
    with pytest.raises(UserError, match="runs/latest is in the way"):
        RunFolder.create(config("mine"))
    assert (LATEST / "note").read_text() == "mine"


def test_an_existing_run_is_found_by_name_or_as_the_newest(here: Path) -> None:
    first, second = (RunFolder.create(config(here / name)) for name in ("first", "second"))
    assert RunFolder.existing(None).path == second.path.resolve()
    named = RunFolder.existing(str(first.path))
    assert named.path == first.path
    # Looking is not working: only a run that goes on becomes the latest.
    assert RunFolder.existing(None).path == second.path.resolve()
    named.keep_config(config(here / "first"), 3)
    assert RunFolder.existing(None).path == first.path.resolve()


def test_settings_of_a_resumed_run_are_kept_with_the_old_ones_beside_them(here: Path) -> None:
    folder = RunFolder.create(config(here / "run"))
    before = (folder.path / "config.toml").read_text()
    folder.keep_config(config(here / "run"), 3)
    assert not list(folder.path.glob("config-*.toml"))
    changed = Config(run=RunSettings(dir=str(here / "run")), schedule=ScheduleSettings(gad_steps=5))
    folder.keep_config(changed, 7)
    assert (folder.path / "config-000007.toml").read_text() == before
    assert load(["--config", str(folder.path / "config.toml")]).schedule.gad_steps == 5


@pytest.mark.parametrize("directory", [None, "nowhere", "empty"])
def test_no_run_to_resume(directory: str | None) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=rf"no run to resume in .*{directory or 'latest'}: .*--run\.dir"):
        RunFolder.existing(directory)
    assert not RUNS.exists()


def test_logs_append_where_the_run_lies() -> None:
    folder = RunFolder.create(config("mine"))
    folder.metrics.write({"step": 1})
    folder.samples.write({"step": 1, "student": "é"})
    again = RunFolder.existing("mine")
    again.metrics.write({"step": 2})
    assert [json.loads(line) for line in Path("mine/metrics.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]
    assert json.loads(Path("mine/samples.jsonl").read_text(encoding="utf-8")) == {"step": 1, "student": "é"}


def test_results_come_back_and_leave_no_partial_files() -> None:
    folder = RunFolder.create(config("mine"))
    rows: list[dict[str, Any]] = [{"prompt": "é\u2028", "reward": 0.1 + 0.2}, {"prompt": "b"}]
    folder.write_evaluation("after_gad", rows)
    folder.write_evaluation("final", [])
    folder.write_summary({"run": "gad", "steps": {"gad": 3}})
    lines = Path("mine/evaluations/after_gad.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows and lines[-1] == ""
    assert Path("mine/evaluations/final.jsonl").read_text() == ""
    assert json.loads(Path("mine/summary.json").read_text()) == {"run": "gad", "steps": {"gad": 3}}
    files = {"config.toml", "summary.json", "evaluations/after_gad.jsonl", "evaluations/final.jsonl"}
    assert snapshot(folder.path).keys() == files


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(config("mine"))
    folder.write_summary({"step": 1})

    def torn(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:5])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        folder.write_summary({"step": 2})
    assert json.loads(Path("mine/summary.json").read_text()) == {"step": 1}
