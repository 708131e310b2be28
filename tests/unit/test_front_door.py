"""What a person meets first: help, version, commands that do not exist, and output that nobody reads."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gadcore import __version__
from gadcore.run import COMMANDS, main
from tests.support.runs import ROOT
from tests.support.tiny import save_tiny

HEAVY = {"torch", "transformers", "vllm", "datasets"}


@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_loads_no_torch(command: str) -> None:
    code = f"""
import sys
from gadcore.run import main
try:
    code = main([{command!r}, "--help"])
except SystemExit as done:
    code = done.code
print("loaded", sorted({HEAVY!r} & set(sys.modules)), code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded [] 0", done.stdout + done.stderr
    assert command in done.stdout and len(done.stdout.splitlines()) > 2


def test_help_of_a_command_by_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "tally"]) == 0
    first = capsys.readouterr().out
    assert main(["tally", "--help"]) == 0
    assert capsys.readouterr().out == first and "KEY.json" in first


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gadcore {__version__}\n"


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_tracker_that_is_not_installed_is_told_first(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *given: None if name == "wandb" else find(name, *given)
    )
    # Neither the rows nor the model are there: they would be told next.
    absent = ["--data.train", "absent.jsonl", "--student.model", "absent"]
    assert main([*more, *absent, "--tracking.tracker", "wandb"]) == 2
    assert 'tracking.tracker = "wandb" needs the package wandb' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repotr"]) == 2
    assert "did you mean report?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("train", "export"))


@pytest.mark.parametrize("module", ["gadcore", "gadcore.run"])
def test_a_reader_that_goes_away_ends_nothing(module: str, tmp_path: Path) -> None:
    """As `| head -1`: the pipe is closed before the first word."""
    command = [sys.executable, "-m", module, "help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


EVIL = "\x1b[2J\u202e\x9b"


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL],
        ["--" + EVIL, "1"],
        ["--data.train", f"{EVIL}.jsonl"],
        ["--run.name", f"{EVIL}/x"],
        ["--run.seed", EVIL],
        ["data", "columns.jsonl"],
        ["data", "rows.jsonl", "--student.model", "model"],
        ["report", EVIL],
        ["tally", EVIL, EVIL],
        ["export", EVIL, "--out", "x"],
        ["eval", f"--eval.models=a={EVIL}", "--eval.in_domain=a=rows.jsonl", "--eval.out", EVIL],
    ],
)
def test_nothing_that_stands_in_a_name_or_file_is_obeyed_by_a_terminal(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("columns.jsonl").write_text(json.dumps({EVIL: "a", f"{EVIL}b": "c"}) + "\n")
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "teacher_response": "b"}) + "\n")
    save_tiny(Path("model"))
    # A template that says something of its own.
    Path("model/chat_template.jinja").write_text("{{ raise_exception('" + EVIL + "') }}")
    assert main(arguments) == 2
    said = "".join(capfd.readouterr())
    assert re.search(r"(·|\\x1b|\\u001b)\[2J", said) and not {"\x1b", "\u202e", "\x9b"} & set(said)
