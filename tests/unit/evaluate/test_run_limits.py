"""eval measures a student within the limits that it was trained with."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.config.loading import load
from gadcore.errors import UserError
from gadcore.evaluate.run_limits import with_run_limits
from gadcore.evaluate.settings import EvalConfig


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, response in (("short", 64), ("same", 64), ("long", 128)):
        folder = Path(name)
        (folder / "student").mkdir(parents=True)
        (folder / "checkpoints/step-000003").mkdir(parents=True)
        (folder / "checkpoints/step-000003/manifest.json").write_text("{}")
        (folder / "config.toml").write_text(
            f'[data]\nmax_response_tokens = {response}\nmax_prompt_tokens = 96\nsystem_prompt = "Be brief."\n'
        )
    return tmp_path


def limits(models: str, *argv: str) -> tuple[tuple, list[str]]:
    told: list[str] = []
    config = with_run_limits(load([f"--eval.models={models}", *argv], EvalConfig), told.append)
    data = config.data
    return (data.max_response_tokens, data.max_prompt_tokens, data.system_prompt), told


@pytest.mark.parametrize("models", ["a=short", "base=some/model,a=short,b=same", "a=short/student"])
def test_the_limits_are_those_of_the_runs(models: str, here: Path) -> None:
    found, told = limits(models)
    assert found == (64, 96, "Be brief.")
    assert len(told) == 1 and "data.max_response_tokens = 64" in told[0]


def test_what_was_chosen_and_models_without_a_run_stay(here: Path) -> None:
    assert limits("a=short", "--data.max_response_tokens=32")[0] == (32, 96, "Be brief.")
    assert limits("base=some/model") == ((1536, 2048, None), [])


def test_runs_that_differ_are_told(here: Path) -> None:
    with pytest.raises(
        UserError, match=r"differ in data.max_response_tokens \(64 in a, 128 in b\): choose one for all"
    ):
        limits("a=short,b=long")
    assert limits("a=short,b=long", "--data.max_response_tokens=100")[0] == (100, 96, "Be brief.")


def test_a_run_whose_settings_cannot_be_read(here: Path) -> None:
    Path("short/config.toml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"short/config.toml is not UTF-8.*or choose .*, data.template_arg"):
        limits("a=short")
