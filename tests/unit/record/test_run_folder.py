"""The run folder: made, refused, found again, and written to in whole files."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gadcore import files
from gadcore.config.loading import load
from gadcore.config.settings import Config, RunSettings, ScheduleSettings
from gadcore.errors import Interrupted, UserError
from gadcore.files import LOCK, temporary
from gadcore.record.run_folder import LATEST, RUNS, TILES, RunFolder, run_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(directory: Path | str | None = None, name: str = "gad") -> Config:
    return Config(run=RunSettings(name=name, dir=None if directory is None else str(directory)))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def started(made: Config, steps: int = 1) -> RunFolder:
    """A run that has ended after so many steps."""
    with run_folder(made) as folder:
        for step in range(1, steps + 1):
            folder.step({"step": step})
        if not steps:
            folder.has_step = True
    folder.metrics.close()
    return folder


def test_a_new_folder_holds_the_config_and_is_the_latest_with_its_first_step() -> None:
    with run_folder(config(name="trial")) as folder:
        assert folder.path.parent == RUNS and folder.path.name.startswith("trial-")
        assert sorted(os.listdir(folder.path)) == [LOCK, "config.toml"]
        assert not LATEST.exists()
        folder.step({"step": 1})
        assert LATEST.is_symlink() and LATEST.resolve() == folder.path.resolve()
    assert sorted(os.listdir(folder.path)) == ["config.toml", "metrics.jsonl"]
    assert folder.checkpoints == folder.path / "checkpoints" and folder.reference == folder.path / "reference"


def test_tiles_are_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("run")
    with run_folder(made) as folder:
        folder.keep_tiles({})
        assert folder.kept_tiles() == {} and not (folder.path / TILES).exists()
        folder.step({"step": 1})
        tiles = {"capability": 90, "kernels": {"prefix_attention._forward": [{"key": [64, 3], "tile": {"BM": 128}}]}}
        folder.keep_tiles(tiles)
    assert RunFolder(folder.path).kept_tiles() == tiles
    # Once: most steps choose nothing new.
    monkeypatch.setattr("gadcore.record.run_folder.write_whole", None)
    folder.keep_tiles(tiles)


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_damaged_tiles_are_told_with_the_ways_out(content: str) -> None:
    folder = started(config("run"))
    (folder.path / TILES).write_text(content)
    with pytest.raises(UserError, match="tiles.json cannot be read .* put it back, or delete it"):
        folder.kept_tiles()


@pytest.mark.parametrize("error", [UserError, OSError, ZeroDivisionError, KeyboardInterrupt])
def test_a_start_that_fails_leaves_nothing(here: Path, error: type[BaseException]) -> None:
    """Neither a folder, nor another latest run, nor anything in the way of the same command."""
    started(config())
    (here / "mine").mkdir()
    (here / "mine/note").write_text("mine")
    before = sorted(here.rglob("*")), os.readlink(LATEST)
    for directory in (None, "deep/new", "mine"):
        with pytest.raises(Interrupted if error is KeyboardInterrupt else error), run_folder(config(directory)) as made:
            made.write_evaluation("before", [{}])
            (made.path / "trace.json").touch()
            raise error
        assert (sorted(here.rglob("*")), os.readlink(LATEST)) == before
    assert started(config("mine")).path == Path("mine")


def test_a_run_that_has_a_step_or_was_stopped_stays() -> None:
    with pytest.raises(UserError), run_folder(config("one")) as folder:
        folder.step({"step": 1})
        raise UserError
    with pytest.raises(Interrupted), run_folder(config("two")) as folder:
        raise Interrupted
    assert RunFolder.existing("one").metrics.steps() == [1]
    assert RunFolder.existing("two").metrics.steps() == []


def test_a_folder_has_one_process_at_a_time(here: Path) -> None:
    started(config("run"))
    resumed = Config(run=RunSettings(dir="run", resume="auto"))
    told = rf"the run run is in use by process {os.getpid()} on \S+: wait"
    with run_folder(resumed), pytest.raises(UserError, match=told), run_folder(resumed):
        pass
    with run_folder(resumed):
        pass


def test_a_start_into_the_folder_of_a_living_run_names_its_process(here: Path) -> None:
    told = rf"the run mine is in use by process {os.getpid()} on \S+: wait"
    with run_folder(config("mine")) as folder:
        folder.step({"step": 1})
        before = snapshot(folder.path)
        with pytest.raises(UserError, match=told), run_folder(config("mine", name="other")):
            pass
        assert snapshot(folder.path) == before
        lock = (folder.path / LOCK).read_bytes()
    # The lock of a process that was killed says nothing.
    (folder.path / LOCK).write_bytes(lock)
    with pytest.raises(UserError, match="mine already holds another run"), run_folder(config("mine")):
        pass
    assert sorted(os.listdir(folder.path)) == ["config.toml", "metrics.jsonl"]


def test_a_command_that_is_told_can_be_pasted() -> None:
    with pytest.raises(Interrupted, match="--run.dir 'my run' --resume auto"), run_folder(config("my run")) as folder:
        folder.step({"step": 1})
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="--run.dir 'my run' --resume auto"), run_folder(config("my run")):
        pass


def test_what_a_kill_left_half_done_goes_where_the_run_goes_on(here: Path) -> None:
    started(config("run"))
    (here / "run/evaluations").mkdir()
    for name in ("run/x", "run/evaluations/x"):
        temporary(here / name).write_text("half")
    (here / "run/x.partial").write_text("somebody else's")
    with run_folder(Config(run=RunSettings(dir="run", resume="auto"))):
        pass
    assert {path.name for path in (here / "run").rglob("*")} == {
        "config.toml",
        "metrics.jsonl",
        "evaluations",
        "x.partial",
    }


def test_a_start_that_was_killed_in_its_first_write_leaves_nothing_to_the_next(here: Path) -> None:
    (here / "run").mkdir()
    temporary(here / "run/config.toml").write_text("half")
    started(config("run"))
    assert {path.name for path in (here / "run").iterdir()} == {"config.toml", "metrics.jsonl"}


def test_the_config_comes_back_equal() -> None:
    made = Config(
        run=RunSettings(name='a "quoted" näme\n', dir="some where/else", seed=3),
        schedule=ScheduleSettings(gad_steps=5, warmup_steps=None),
    )
    folder = started(made)
    # Without the folder: fed back, the settings start a run of their own.
    assert load(["--config", str(folder.path / "config.toml"), "--run.dir", "some where/else"]) == made
    assert load(["--config", str(folder.path / "config.toml")]).run.dir is None


def test_two_runs_of_one_second_get_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20250102-030405")
    names = [started(config()).path.name for _ in range(3)]
    assert names == ["gad-20250102-030405", "gad-20250102-030405-2", "gad-20250102-030405-3"]
    assert LATEST.resolve().name == names[-1]


def test_a_folder_of_another_run_is_refused_untouched(here: Path) -> None:
    started(config(here / "mine"))
    before = snapshot(here / "mine")
    with pytest.raises(UserError, match=r"mine already holds another run: .*run\.dir.*--resume auto"):
        started(config(here / "mine", name="other"))
    assert snapshot(here / "mine") == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "student", "summary.json"])
def test_what_looks_like_a_part_of_a_run_is_not_mixed_with_a_new_one(here: Path, name: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / name).write_text("old")
    with pytest.raises(UserError, match=rf"mine/{name} is there already and would be mixed with the new run"):
        started(config("mine"))
    assert snapshot(here / "mine") == {name: b"old"}


def test_an_empty_folder_may_be_there_already(here: Path) -> None:
    (here / "deep/mine").mkdir(parents=True)
    assert started(config("deep/mine")).path == Path("deep/mine")


def test_a_file_in_the_way_of_the_folder_is_named(here: Path) -> None:
    (here / "file").touch()
    for directory in ("file", "file/deep"):
        with pytest.raises(UserError, match="file is a file where a folder is needed: choose another run.dir"):
            started(config(directory))


def test_the_latest_link_survives_a_move_of_the_whole_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    folder = started(config())
    monkeypatch.chdir(here)
    (here / "work").rename(here / "moved")
    monkeypatch.chdir(here / "moved")
    assert RunFolder.existing(None).path.name == folder.path.name


def test_only_runs_of_runs_are_the_latest(here: Path) -> None:
    started(config(here / "elsewhere"))
    assert not RUNS.exists()
    started(config("runs/mine"))
    assert os.readlink(LATEST) == "mine"


def test_a_dangling_latest_link_is_replaced() -> None:
    RUNS.mkdir()
    LATEST.symlink_to("gone")
    folder = started(config())
    assert LATEST.resolve() == folder.path.resolve()


def test_something_else_named_latest_is_left_alone() -> None:
    LATEST.mkdir(parents=True)
    (LATEST / "note").write_text("mine")
    with pytest.raises(UserError, match="runs/latest is in the way"):
        started(config())
    assert (LATEST / "note").read_text() == "mine" and os.listdir(RUNS) == ["latest"]


def test_an_existing_run_is_found_by_name_or_as_the_newest(here: Path) -> None:
    first, second = (started(config(here / "runs" / name)) for name in ("first", "second"))
    assert RunFolder.existing(None).path == second.path.resolve()
    named = RunFolder.existing(str(first.path))
    assert named.path == first.path
    # Looking is not working: only a run that takes a step becomes the latest.
    assert RunFolder.existing(None).path == second.path.resolve()
    named.step({"step": 2})
    assert RunFolder.existing(None).path == first.path.resolve()


def test_settings_of_a_resumed_run_are_kept_with_the_old_ones_beside_them(here: Path) -> None:
    folder = started(config(here / "run"))
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
    folder = started(config("mine"), steps=0)
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
    folder = started(config("mine"), steps=0)
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
    folder = started(config("mine"), steps=0)
    folder.write_summary({"step": 1})

    def torn(path: Path) -> None:
        os.truncate(path, 5)
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(files, "sync", torn)
    with pytest.raises(OSError, match="disk full"):
        folder.write_summary({"step": 2})
    assert json.loads(Path("mine/summary.json").read_text()) == {"step": 1}
    assert sorted(os.listdir("mine")) == ["config.toml", "summary.json"]
