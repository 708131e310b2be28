"""What is told of a run at once: missing files, and folders that it cannot have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.files import held
from gadcore.record.run_folder import LOCK
from gadcore.train.early import check_files


def config(**given: dict[str, str]) -> Config:
    return Config.model_validate(given)


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_missing_data_file_is_told(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the data file .*rows\.csv\.gz does not exist$"):
        check_files(config(data={key: str(tmp_path / "rows.csv.gz")}), new=True)


def test_what_may_be_there_is_told_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    for name in ("builtin", "owner/name", str(tmp_path / "nothing"), str(tmp_path / "rows.jsonl"), str(tmp_path)):
        check_files(config(data={"train": name}, run={"dir": str(tmp_path / "new")}), new=True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_taken_is_told_and_left_alone(tmp_path: Path) -> None:
    taken = config(run={"dir": str(tmp_path)})
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.jsonl is there already and would be mixed with the new run"):
        check_files(taken, new=True)
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match="already holds another run"):
        check_files(taken, new=True)
    check_files(taken, new=False)
    check_files(config(run={"dir": str(tmp_path), "resume": "auto"}), new=True)
    with held(tmp_path / LOCK, "the run"), pytest.raises(UserError, match=r"process \d+ on "):
        check_files(taken, new=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "metrics.jsonl"]


def test_a_lock_that_was_left_behind_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_files(config(run={"dir": str(tmp_path)}), new=True)


def test_of_several_processes_none_ends_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_files(config(data={"train": str(tmp_path / "rows.csv")}), new=True)


def test_torch_is_not_waited_for() -> None:
    program = "import sys, gadcore.train.early; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    "command",
    [
        ["data", "absent.csv"],
        ["train", "--data.train", "absent.csv"],
        ["seqkd", "--data.eval", "absent.csv"],
        ["eval", "--eval.models", "a=absent", "--eval.in_domain", "b=absent.csv"],
        ["eval", "--eval.models", "a=absent", "--eval.out_of_domain", "b=absent.csv"],
    ],
)
def test_every_command_that_reads_rows_tells_it_first(command: list[str], tmp_path: Path) -> None:
    program = f"import sys; from gadcore.run import main; print(main({command!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 False\n"
    of_set = "set b: " if command[0] == "eval" else ""
    assert done.stderr == f"gadcore: {of_set}the data file absent.csv does not exist\n"
