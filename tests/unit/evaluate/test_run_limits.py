"""eval measures a student within the limits that it was trained with, and reads sets by the columns of its rows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from gadcore.config.loading import load
from gadcore.data.rows import load_rows
from gadcore.errors import UserError
from gadcore.evaluate import measure, sampling, table
from gadcore.evaluate.command import main
from gadcore.evaluate.run_limits import with_run_columns, with_run_limits
from gadcore.evaluate.sampling import all_sets, sample_all
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


COLUMNS = {"prompt": "User Question", "teacher_response": "GPT-4 Answer"}


@pytest.fixture
def tables(here: Path) -> Path:
    for name, columns in (("mine", COLUMNS), ("twin", COLUMNS), ("other", {"prompt": "q"}), ("plain", {})):
        lines = "".join(f'{key} = "{value}"\n' for key, value in columns.items())
        Path(name).mkdir()
        Path(name, "config.toml").write_text(f'[data]\ntrain = "rows.csv"\n[data.columns]\n{lines}')
    Path("own.csv").write_text("ID,User Question,GPT-4 Answer\n1,Why so?,Because it is.\n2,And now?,Nothing.\n")
    Path("usual.jsonl").write_text('{"prompt": "a", "teacher_response": "b"}\n')
    return here


def columns_of(models: str, *argv: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    told: list[str] = []
    config = with_run_columns(load([f"--eval.models={models}", *argv], EvalConfig), told.append)
    return {name: chosen.columns for name, chosen in all_sets(config).items()}, told


def test_sets_are_read_by_the_columns_of_the_runs(tables: Path) -> None:
    sets = ("--eval.in_domain=own=own.csv,usual=usual.jsonl", "--eval.out_of_domain=gone=gone.csv,more=own.csv")
    for models in ("a=mine", "base=some/model,a=mine,b=twin"):
        found, told = columns_of(models, *sets)
        assert found == {"own": COLUMNS, "usual": {}, "gone": {}, "more": COLUMNS}
        assert len(told) == 1 and "columns = " in told[0] and told[0].endswith("of own and more")
        rows = load_rows("own.csv", found["own"])
        assert [row.teacher_response for row in rows] == ["Because it is.", "Nothing."]


def test_runs_that_differ_in_columns_give_none_and_a_sets_own_stay(tables: Path) -> None:
    for models in ("a=mine,b=other", "a=mine,b=plain", "a=plain", "base=some/model"):
        assert columns_of(models, "--eval.in_domain=own=own.csv") == ({"own": {}}, [])
    own = {"prompt": "ID", "teacher_response": "GPT-4 Answer"}
    value = """{own = {source = "own.csv", columns = {prompt = "ID", teacher_response = "GPT-4 Answer"}}}"""
    assert columns_of("a=mine", f"--eval.in_domain={value}") == ({"own": own}, [])


def test_the_command_reads_sets_so(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sampling, "sample_all", lambda config, *others: seen.append(config.eval.in_domain))
    monkeypatch.setattr(measure, "measure_set", lambda *others, **more: ({}, {}, 0))
    monkeypatch.setattr(table, "markdown", lambda evaluation: "")
    assert main(["--eval.models=a=mine", "--eval.in_domain=own=own.csv", "--fresh.enabled=false"]) == 0
    assert seen[0]["own"].columns == COLUMNS


def test_the_advice_of_eval_is_a_setting_of_eval(tables: Path) -> None:
    sets = ["--eval.in_domain=usual=usual.jsonl", """--eval.out_of_domain={own = {source = "own.csv", rows = 2}}"""]
    config = load(["--eval.models=base=some/model", *sets], EvalConfig)
    with pytest.raises(UserError, match="set own: 2 of 2 rows of own.csv cannot be used: name its columns") as caught:
        sample_all(config, torch.device("cpu"), print)
    (word,) = re.findall(r"--eval.out_of_domain ('[^']*')", str(caught.value))
    (value,) = shlex.split(word)
    own = load(["--eval.models=base=some/model", "--eval.out_of_domain", value], EvalConfig).eval.out_of_domain["own"]
    assert own.columns == COLUMNS and own.rows == 2
    assert len(load_rows(own.source, own.columns)) == 2
    assert "data.columns" not in str(caught.value)


def test_the_column_map_of_a_run_is_no_setting_of_eval(tables: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(["--data.columns", "prompt=ID"], EvalConfig)
    said = str(caught.value)
    assert said.startswith("unknown setting data.columns (command line): a set has columns of its own")
    (word,) = re.findall(r"--eval.in_domain ('[^']*')", said)
    load(["--eval.in_domain", *shlex.split(word)], EvalConfig)
