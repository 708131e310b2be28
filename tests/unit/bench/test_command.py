"""python -m bench: what is refused, what is written, and the exit code."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import record
from bench.kernels import suite
from bench.suites import SUITES, TABLES
from tests.support.bench_rows import result


def test_unknown_suite_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["kernel"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("kernels", "traffic", "aot", "tables", "'kernel'"))


@pytest.mark.parametrize("threads", ["0", "100000", "one", "1,,2"])
def test_thread_counts_that_cannot_be_are_refused(threads: str) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["kernels", "--threads", threads])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["aot", "--threads", "1"],
        ["kernels", "--cases", "real"],
        ["kernels", "--seeds", "2"],
        ["rollout", "--steps", "2"],
        ["tables", "--quick"],
    ],
)
def test_an_option_of_another_suite_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert f"bench {arguments[0]}: error: unrecognized arguments: {arguments[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", SUITES)
def test_what_a_command_line_gives_is_what_the_suite_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options reach run() by name, with its own defaults where they are left out."""
    module = importlib.import_module(SUITES[name].module)
    takes = inspect.signature(module.run)
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "run", lambda **options: given.update(options) or [])
    assert command.main([name, *(["folder"] if name == "real" else []), "--quick"]) == 0
    bound = takes.bind(**given)
    bound.apply_defaults()
    assert bound.arguments == given and given["quick"] is True


def test_the_tables_are_written_whole_and_the_kernels_alone_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "path_of", lambda suite: tmp_path / "none.json")
    for name in TABLES:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "DOCUMENT", tmp_path / module.DOCUMENT.name)
    assert command.main(["tables", "--out", str(tmp_path / "alone" / "k.md")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]
    assert command.main(["tables"]) == 0
    written = {path.name: path.read_text() for path in tmp_path.glob("*.md")}
    names = (
        "kernels",
        "step",
        "trl",
        "soda",
        "rollout",
        "memory",
        "adapters",
        "reshard",
        "findings",
        "default-job",
        "methods",
    )
    assert written.keys() == {f"{name}.md" for name in names}
    assert all("Not run" in text for text in written.values())
    assert written["kernels.md"] == (tmp_path / "alone" / "k.md").read_text()


@pytest.mark.parametrize(("gate", "code"), [("pass", 0), ("fail", 1)])
def test_a_failed_gate_is_an_exit_code(
    gate: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "run", lambda **_: [record.as_row(result(gate=gate))])
    out = tmp_path / "out.json"
    assert command.main(["kernels", "--out", str(out)]) == code
    assert record.read(out)[0]["gate"] == gate
    assert ("FAILED" in capsys.readouterr().err) == (gate == "fail")


def test_quick_writes_no_results_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "run", lambda **_: [record.as_row(result())])
    monkeypatch.setattr(record, "write", lambda path, rows: pytest.fail(f"wrote {path}"))
    assert command.main(["kernels", "--quick"]) == 0
    assert "not written" in capsys.readouterr().out
