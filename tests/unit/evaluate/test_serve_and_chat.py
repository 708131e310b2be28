"""A finished student, served and talked to."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gadcore.evaluate import chat_command
from gadcore.run import main
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def finished(module_folder: Path) -> Path:
    """The folder of a finished run whose student is a tiny random model."""
    save_tiny(module_folder / "run" / "student")
    (module_folder / "run" / "config.toml").write_text('[data]\nsystem_prompt = "Be brief."\n')
    return module_folder / "run"


@pytest.fixture
def heard(monkeypatch) -> list[list[str]]:
    """What a student that answers "yes" was shown: the texts of every conversation."""
    conversations: list[list[str]] = []

    def respond(messages: chat_command.Messages) -> Iterator[str]:
        conversations.append([message["content"] for message in messages])
        yield from ("y", "es")

    monkeypatch.setattr(chat_command, "_responder", lambda *_: respond)
    return conversations


def say(lines: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", *arguments]) == 0


def test_a_conversation_goes_on_until_an_empty_line(finished: Path, heard, monkeypatch, capsys) -> None:
    say("One\nTwo\n\nThree", monkeypatch, str(finished))
    first = ["Be brief.", "One"]
    assert heard == [first, [*first, "yes", "Two"], ["Be brief.", "Three"]]
    assert capsys.readouterr().out == "yes\n" * 3


def test_a_response_keeps_its_spaces_and_loses_what_a_terminal_obeys(finished: Path, monkeypatch, capsys) -> None:
    pieces = ("The ", "sky", " is\n", "\n  blue", "\x1b[2J\u202e")
    monkeypatch.setattr(chat_command, "_responder", lambda *_: lambda messages: iter(pieces))
    say("One\n", monkeypatch, str(finished))
    assert capsys.readouterr().out == "The sky is\n\n  blue·[2J·\n"


def test_the_system_message_is_that_of_the_run_or_the_one_given(finished: Path, heard, monkeypatch) -> None:
    say("One\n", monkeypatch, str(finished), "--system", "Shout.")
    say("One\n", monkeypatch, str(finished / "student"))
    assert heard == [["Shout.", "One"], ["One"]]


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_a_model_answers(finished: Path, temperature: str, monkeypatch, capsys) -> None:
    say("Hello\n", monkeypatch, str(finished), "--temperature", temperature, "--max-tokens", "8")
    assert capsys.readouterr().out.strip()


def served(arguments: list[str], monkeypatch) -> tuple[list[str], dict[str, str]]:
    """(the command, its environment) of the server that would take this process's place."""
    became: list[tuple[list[str], dict[str, str]]] = []

    class Replaced(Exception):
        pass

    def replace(path: str, command: list[str], environment: dict[str, str]) -> None:
        became.append((command, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", replace)
    with pytest.raises(Replaced):
        main(["serve", *arguments])
    return became[0]


def test_serve_is_vllms_server_on_loopback(finished: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("vllm")
    command, environment = served([str(finished), "--port", "8123", "--", "--max-model-len", "64"], monkeypatch)
    text = " ".join(command)
    assert f"-m vllm.entrypoints.openai.api_server --model {finished / 'student'}" in text
    assert "--served-model-name student --host 127.0.0.1 --port 8123" in text and text.endswith("--max-model-len 64")
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert "'Be brief.'" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "eager"), [("cpu", True), ("cuda", False)])
def test_on_a_cpu_the_server_compiles_nothing_unless_told(
    device: str, eager: bool, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr("gadcore.config.device.best_device", lambda: torch.device(device))
    command, _ = served([str(finished), "--", "--no-enforce-eager"], monkeypatch)
    assert ("--enforce-eager" in command) == eager
    # vLLM takes the last one of the two.
    assert command[-1] == "--no-enforce-eager"


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_what_holds_no_student_is_told(command: str, tmp_path: Path, capsys) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "neither a run folder nor a model's" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text("")
    assert main([command, str(tmp_path)]) == 2
    assert "has not finished" in capsys.readouterr().err
    assert main([command, str(tmp_path), "--prot", "1"]) == 2
    assert f"see {command} --help" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_of_an_unfinished_run_only_what_is_there_is_named(command: str, tmp_path: Path, capsys) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    go_on = f"go on with it by --run.dir '{run}' --resume auto"

    def told(every: int) -> str:
        (run / "config.toml").write_text(f"[checkpoint]\nevery = {every}\n")
        assert main([command, str(run)]) == 2
        return capsys.readouterr().err

    assert "no checkpoint yet: wait for the next one, at step 20 or the end of its first stage" in told(20)
    row = '{"stage": "sft", "step": 3, "stage_step": 3, "stage_steps": 10}\n'
    (run / "metrics.jsonl").write_text(row + '{"stage": "s')
    # As the stage ends, or before that.
    assert "wait for the next one, at step 10, while it runs" in told(20)
    assert "wait for the next one, at step 4, while it runs" in (text := told(4))
    assert go_on in text and "export" not in text
    assert "(checkpoint.every = 0)" in (text := told(0))
    assert go_on in text and "export" not in text and "wait" not in text
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    text = told(4)
    assert go_on in text and f"`gadcore export '{run}' --out FOLDER`" in text and "no checkpoint" not in text


def test_settings_that_cannot_be_read_are_told(finished: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "student").symlink_to(finished / "student")
    (tmp_path / "config.toml").write_bytes(b"\xff")
    assert main(["chat", str(tmp_path)]) == 2
    assert "config.toml cannot be read" in capsys.readouterr().err


def test_serve_without_vllm_names_chat(finished: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(finished)]) == 2
    assert "gadcore chat" in capsys.readouterr().err
