"""What a person meets first: help, version, commands that do not exist, and output that nobody reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gadcore import __version__
from gadcore.run import COMMANDS, main
from tests.support.runs import ROOT

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
