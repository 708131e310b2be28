"""The default job, seed by seed: what is read of its runs, when one is made, and what the document says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.default import suite, tables
from gadcore.errors import UserError
from tests.support import report_runs

BETTER = {
    "before": report_runs.answers(0.2),
    "after_sft": report_runs.answers(0.3, distinct_2=0.5),
    "after_gad": [row | {"distinct_2": 0.6 + 0.001 * (i % 3)} for i, row in enumerate(report_runs.answers(0.29))],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run, all of which fail."""
    found: list[list[str]] = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess:
        found.append(arguments)
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr(suite.subprocess, "run", run)
    return found


def written(folder: Path, evaluations: dict[str, list[dict[str, Any]]] = BETTER) -> Path:
    return report_runs.folder(folder, report_runs.metrics(), evaluations)


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path, calls: list[list[str]]) -> None:
    written(tmp_path / "seed-0")
    (row,) = suite.run(False, seeds=1, work=tmp_path)
    assert calls == []
    assert row["sentences"][0].startswith("GAD made nothing better that 40 held-out prompts can show; worse on 40 ")
    assert "It moved what a higher temperature moves as well: distinct-2 rose from 0.500 to" in row["sentences"][0]
    assert row["control"] is None
    assert [(stage["before"], stage["after"]) for stage in row["stages"]] == [
        ("before", "after_sft"),
        ("after_sft", "after_gad"),
    ]
    gad = row["stages"][1]["changes"]
    assert gad["distinct-2"]["mean"] == pytest.approx(0.101, abs=1e-3) and gad["distinct-2"]["change"] is None
    assert gad["ROUGE-L"]["change"] == "worse"
    assert row["evaluations"]["after_sft"]["ROUGE-L"] == pytest.approx(0.3, abs=2e-3)
    assert row["seconds"]["total"] == 100.0 and row["prompts"] == 40


def test_a_later_first_seed_goes_on_there(tmp_path: Path, calls: list[list[str]]) -> None:
    for seed in (2, 3):
        written(tmp_path / f"seed-{seed}")
    assert [row["seed"] for row in suite.run(False, seeds=2, first=2, work=tmp_path)] == [2, 3]
    with pytest.raises(SystemExit):
        command.main(["default", "--first", "-1"])
    assert calls == []


def test_a_finished_run_of_other_settings_is_no_result_of_these(tmp_path: Path, calls: list[list[str]]) -> None:
    with pytest.raises(RuntimeError):
        next(suite.run(False, work=tmp_path, settings=["--student.lr=1e-6"]))
    written(tmp_path / "seed-0")
    for settings in ([], ["--student.lr=1e-5"]):
        with pytest.raises(UserError, match="seed-0 was made with other settings: name another --work, or delete it"):
            next(suite.run(False, work=tmp_path, settings=settings))
    assert next(suite.run(False, work=tmp_path, settings=["--student.lr=1e-6"]))["seed"] == 0 and len(calls) == 1


def test_a_run_that_was_stopped_goes_on_and_one_that_is_not_there_begins(
    tmp_path: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "rows.json"), "--work", str(tmp_path), "--seeds", "1", "--student.lr=1e-6"]
    assert command.main(["default", *out]) == 1
    assert "the run of seed 0 ended with exit code 3" in capsys.readouterr().err
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0/config.toml").touch()
    assert command.main(["default", *out]) == 1
    new, resumed = calls
    assert "--run.resume=auto" not in new and "--run.resume=auto" in resumed
    for given in calls:
        assert {"--preset=smollm2-cpu", "--run.seed=0", f"--run.dir={tmp_path / 'seed-0'}"} < set(given)
        assert given[-1] == "--student.lr=1e-6"
    assert not (tmp_path / "rows.json").exists()


def test_a_run_without_evaluations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run with evaluations: delete it"):
        suite.row_of(written(tmp_path / "run", {}), 0)


def test_the_document_marks_what_the_intervals_show(tmp_path: Path) -> None:
    row = suite.row_of(written(tmp_path / "run"), 4)
    text = tables.document(lambda name: json.loads(json.dumps([row])))
    assert "## Seed 4" in text and f"- {row['sentences'][0]}\n" in text
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["distinct-2"].endswith("| 0.601 | – | +0.101 ± 0.000 |")
    assert lines["ROUGE-L"].endswith("| **+0.100 ± 0.000** | *-0.010 ± 0.000* |")
    assert "by SFT" in lines["measure"] and "by GAD" in lines["measure"]
    assert "0:01:40" in text


def test_the_document_has_gad_beside_the_control(tmp_path: Path) -> None:
    row = suite.row_of(written(tmp_path / "run"), 4)
    row["control"] = {
        "temperature": 0.9,
        "means": {"ROUGE-L": 0.295},
        "changes": {"ROUGE-L": {"mean": -0.005, "margin": 0.009, "change": "noise"}},
    }
    text = tables.document(lambda name: [row])
    assert " | before GAD, at T = 0.9 | GAD beside that |\n" in text
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["ROUGE-L"].endswith(" | 0.295 | -0.005 ± 0.009 |")
    assert lines["distinct-2"].endswith(" | – | – |")


def test_the_document_has_means_over_the_seeds(tmp_path: Path) -> None:
    row = suite.row_of(written(tmp_path / "run"), 0)

    def of_seed(seed: int, rouge_l: float, style: float) -> dict[str, Any]:
        of = {"ROUGE-L": rouge_l, "responses cut": style}
        changes = {name: {"mean": mean, "margin": 0.5, "change": "noise"} for name, mean in of.items()}
        control = {"temperature": 0.9, "means": {}, "changes": {"ROUGE-L": changes["ROUGE-L"]}}
        return {**row, "seed": seed, "stages": [{**row["stages"][-1], "changes": changes}], "control": control}

    text = tables.document(lambda name: [of_seed(0, 0.01, 0.02), of_seed(1, 0.02, 0.03), of_seed(2, 0.03, -0.05)])
    lines = text[text.index("## Over the seeds") : text.index("## Seed 0")].splitlines()
    # The t interval of .01, .02, .03 is 4.303 * .01 / sqrt(3) = .025; of .02, .03, -.05 it is .108.
    assert "| ROUGE-L | +0.020 ± 0.025 | +0.020 ± 0.025 |" in lines
    assert "| responses cut | +0.0 pp ± 10.8 | – |" in lines
    text = tables.document(lambda name: [of_seed(i, 0.02 + i / 1000, 0.02 + i / 1000) for i in range(3)])
    assert "| ROUGE-L | **+0.021 ± 0.002** | **+0.021 ± 0.002** |" in text
    assert "| responses cut | *+2.1 pp ± 0.2* | – |" in text
    assert "Over the seeds" not in tables.document(lambda name: [of_seed(0, 0.01, 0.02)])


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()
