"""Fourteen ways to start a run wrongly: each stops early, with exit code 2 and one sentence."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from gadcore.run import main
from tests.support.runs import run, tiny_arguments
from tests.support.tiny import save_tiny

GOOD = {"prompt": "Name a city.", "teacher_response": "Paris."}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    return tiny_arguments(tmp_path_factory.mktemp("base"))


@pytest.fixture
def start(base, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Starts a run with settings on top of good ones; returns what it said on standard error."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_CBWR"):
        monkeypatch.setenv(name, os.environ.get(name, "1" if name == "OMP_NUM_THREADS" else "passive"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def attempt(*arguments: str) -> str:
        code = main([*base, *arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        (sentence,) = error.strip().splitlines()
        assert "Traceback" not in sentence and sentence.startswith("gadcore: ")
        return sentence

    yield attempt
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows(path: Path, *lines: object) -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return str(path)


def says(sentence: str, *parts: str) -> None:
    for part in parts:
        assert part in sentence, f"{part!r} is not in {sentence!r}"


def test_01_missing_file(start) -> None:
    says(start("--data.train", "nowhere.jsonl"), "nowhere.jsonl", "does not exist")


def test_02_broken_json(start, tmp_path) -> None:
    path = rows(tmp_path / "rows.jsonl", GOOD, '{"prompt": "x", ')
    says(start("--data.train", path), "rows.jsonl:2", "JSON")


def test_03_row_without_a_response(start, tmp_path) -> None:
    path = rows(tmp_path / "rows.jsonl", GOOD, GOOD, {"prompt": "x"})
    says(start("--data.train", path), "rows.jsonl:3", "teacher_response", "prompt")


@pytest.mark.parametrize("response", ["", " \n\t "])
def test_04_empty_response(start, tmp_path, response) -> None:
    path = rows(tmp_path / "rows.jsonl", GOOD, {"prompt": "x", "teacher_response": response})
    says(start("--data.train", path), "rows.jsonl:2", "empty")


def test_05_not_utf8(start, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "teacher_response": "x"}\n')
    says(start("--data.train", str(path)), "rows.jsonl:2", "UTF-8")


def test_06_no_usable_rows_left(start, tmp_path) -> None:
    path = rows(tmp_path / "rows.jsonl", {"prompt": "word " * 200, "teacher_response": "x"})
    says(start("--data.train", path, "--data.long_prompt", "drop"), "no usable rows", "1 of 1", "too long")


def test_07_unknown_key(start, tmp_path) -> None:
    says(start("--data.trian", "x"), "data.trian", "command line", "did you mean data.train?")
    (tmp_path / "mine.toml").write_text("[schedule]\nbatchsize = 3\n")
    assert main(["--config", "mine.toml"]) == 2


def test_08_wrong_type(start) -> None:
    says(start("--schedule.batch_size", "many"), "schedule.batch_size", "many", "whole number")


def test_09_model_directory_that_is_none(start, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    says(start("--student.model", str(tmp_path / "empty")), "empty", "not a model directory", "config.json")
    says(start("--student.model", "./nowhere"), "./nowhere", "no model")


def test_10_tokenizer_without_a_chat_template(start, tmp_path) -> None:
    directory = save_tiny(tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    path = rows(tmp_path / "rows.jsonl", {"content": [{"role": "user", "content": "x"}], "teacher_response": "y"})
    says(start("--student.model", str(directory), "--data.train", path), "model", "no chat template")


def test_10_template_argument_that_nothing_reads(start) -> None:
    says(start("--data.template_arguments", "enable_thinkin=false"), "enable_thinkin,", "does not read")


def test_11_group_of_one(start) -> None:
    says(start("--rollout.group_size", "1"), "rollout.group_size = 1", "2 or more")


def test_12_folder_of_another_run(start, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.toml").write_text("")
    says(start("--run.dir", "other"), "other", "already holds another run", "--resume auto")


def test_13_checkpoint_with_a_wrong_checksum(start, base, tmp_path) -> None:
    done = run([*base, "--run.dir", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    newest = max((tmp_path / "run/checkpoints").iterdir())
    damaged = newest / "student.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    # As if it had died before its end: nothing is read of a finished run.
    (tmp_path / "run/summary.json").unlink()
    says(start("--run.dir", "run", "--resume", "auto"), str(damaged.relative_to(tmp_path)), "checksum", "resume from")


def test_14_prompt_limit_above_the_context(start) -> None:
    says(start("--rollout.context_tokens", "64"), "data.max_prompt_tokens = 96", "rollout.context_tokens = 64")
    says(start("--data.max_prompt_tokens", "4000"), "4024", "256", "data.max_prompt_tokens")


def test_nothing_is_left_behind(start, tmp_path) -> None:
    start("--data.train", "nowhere.jsonl")
    says(start("--discriminator.model", "./nowhere"), "./nowhere")
    says(start("--run.device", "cuda:1"), "cuda:1", "CUDA_VISIBLE_DEVICES")
    says(start("--algorithm.loss", "no_such_module:f"), "algorithm.loss", "no_such_module cannot be imported")
    says(start("--algorithm.reward", "os:nothing", "--dry-run"), "algorithm.reward", "has no function 'nothing'")
    says(start("--rollout.engine", "os:getcwd", "--dry-run"), "rollout.engine", "has no class 'getcwd'")
    says(start("--rollout.engine", "pathlib:Path"), "rollout.engine", "gadcore.rollout.engine.Engine, and is none")
    says(start("--rollout.engine", "gadcore.rollout.engine:Engine"), "rollout.engine", "lacks generate, update_weights")
    (tmp_path / "broken.py").write_text("1 / 0")
    says(start("--rollout.engine", "broken:E"), "cannot be imported (ZeroDivisionError: division by zero)")
    assert not (tmp_path / "runs").exists()


def test_unknown_command_and_missing_run(start, tmp_path, monkeypatch, capsys) -> None:
    assert main(["trian"]) == 2
    says(capsys.readouterr().err, "trian", "train?")
    assert main(["--resume", "auto"]) == 2
    says(capsys.readouterr().err, "no run to resume", "--run.dir")
    # none unsets it: the error is about the seed.
    assert main(["--resume", "none", "--run.seed", "x"]) == 2
    says(capsys.readouterr().err, "run.seed", "whole number")


def test_a_report_tells_how_it_is_asked_for(capsys) -> None:
    assert main(["report", "--help"]) == 0
    says(capsys.readouterr().out, "report [RUN_FOLDER]")
