"""Old names of settings and values: one sentence that says where the old one stands, and the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.config import loading
from gadcore.config.command_line import setting_kinds
from gadcore.config.renamed import RENAMED
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.run import main


def error_of(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        loading.load(arguments)
    return str(caught.value)


@pytest.mark.parametrize("key", ["train", "eval"])
def test_the_built_in_rows_had_another_name(key: str, tmp_path: Path) -> None:
    assert error_of(f"--data.{key}", "house") == f'data.{key} = "house" (command line) is called "builtin" now'
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\n{key} = "house"\n')
    assert error_of("--config", str(path)) == f'data.{key} = "house" ({path}) is called "builtin" now'
    assert loading.load(["--config", str(path), f"--data.{key}=builtin"]).data == Config().data


def test_a_setting_that_had_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "sampler.number", "rollout.group_size")
    assert error_of("--sampler.number=3") == "sampler.number (command line) is called rollout.group_size now"
    (tmp_path / "run.toml").write_text("[sampler]\nnumber = 3\n")
    assert "is called rollout.group_size now" in error_of("--config", str(tmp_path / "run.toml"))


def test_a_preset_is_read_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.toml").write_text('[data]\ntrain = "house"\n')
    monkeypatch.setattr(loading, "_PRESETS", tmp_path)
    assert error_of("--preset", "old") == 'data.train = "house" (preset old) is called "builtin" now'


def test_a_run_that_was_begun_under_the_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("begun").mkdir()
    Path("begun/config.toml").write_text('[data]\ntrain = "house"\n')
    assert main(["--resume", "auto", "--run.dir", "begun"]) == 2
    assert capsys.readouterr().err == 'gadcore: data.train = "house" (begun/config.toml) is called "builtin" now\n'


def test_every_new_name_is_a_setting() -> None:
    for old, new in RENAMED.items():
        key = new if isinstance(old, str) else old[0]
        assert key in setting_kinds(Config)
