"""`python -m gadcore.run plan` from end to end, its settings and machines, and what it says of bad input."""

from __future__ import annotations

import json
import re

import pytest

from gadcore import run
from gadcore.config import loading
from gadcore.errors import UserError
from gadcore.memory.holdings import NEEDS
from gadcore.plan import calibrate, calibration, show
from gadcore.plan.assumptions import Assumption, Assumptions
from gadcore.plan.command import main
from gadcore.plan.dimensions import read_config, read_dimensions
from gadcore.plan.machine import find
from gadcore.plan.settings import load
from gadcore.record.tracking import read_rows
from tests.support.tiny import save_tiny


@pytest.fixture(autouse=True)
def _no_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "path", lambda: tmp_path / "machine.json")


@pytest.mark.native
def test_the_papers_case_end_to_end(tmp_path, capsys) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", "--preset", "qwen2.5-14b", "--plan.machine", "2x8-h100-80gb", "--plan.out", str(out)]
    assert run.main(arguments) == 0
    text = capsys.readouterr().out
    for words in ("All figures are predicted", "the paper states about 30 hours", "engine.kv_cache"):
        assert words in text
    content = json.loads(out.read_text())
    for item in content["assumptions"]:
        assert item["name"] in text and item["unit"] and item["why"]
    plan = content["to_use"]
    assert plan["fits"] and plan["problems"] == [] and content["machine"]["ranks"] == 16
    assert f"{plan['seconds']['total'] / 3600:.3g} hours" in text
    bars = [line for line in text.splitlines() if re.search(r"[|] \d+\.\d of \d+\.\d GB$", line)]
    assert len(bars) == len(NEEDS) and len({line.index("|") for line in bars}) == 1
    states = plan["memory_bytes"]
    assert set(states) == set(NEEDS)
    for state in states.values():
        parts = sum(state["held"].values()) + sum(state["working"].values())
        assert state["total"] == pytest.approx(parts) and state["total"] <= plan["usable_bytes"] * (1 + 1e-9)
    assert "off 200872 / 200872 = 1.000" in text


def test_a_plan_that_does_not_fit_says_what_would(capsys) -> None:
    arguments = ["--preset", "qwen2.5-7b", "--plan.machine", "h100-80gb-x1", "--plan.check_activations", "false"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text and "What would make it fit" in text and "2 ranks of the same accelerator" in text
    assert "30 hours" not in text and "torchrun" not in text


def test_every_assumption_can_be_overridden(capsys) -> None:
    base = ["--preset", "qwen2.5-3b", "--plan.machine", "h100-80gb-x8", "--plan.check_activations", "false"]
    assert main(base) == 0
    plain = capsys.readouterr().out
    assert main([*base, "--plan.assume", "product_share=0.3, memory_bytes=60e9", "--plan.rows=1000"]) == 0
    changed = capsys.readouterr().out
    assert "of 57.0 GB" in changed and "of 76.0 GB" in plain
    assert changed.count("plan.assume") == plain.count("plan.assume") + 2 and "warmup (4 steps)" in changed


def test_a_machine_file(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100-80gb"\nnodes = 2\naccelerators = 4\nmemory_bytes = 141e9\n')
    machine = find(str(path), 1)
    assert (machine.name, machine.ranks, machine.figures["memory_bytes"]) == ("mine", 8, 141e9)
    path.write_text('base = "cpu"\nname = "board"\nproduct_flops_float32 = 10e9\n')
    board = find(str(path), 1)
    assert (board.name, board.kind, board.ranks, board.product_flops("float32")) == ("board", "cpu", 1, 10e9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("memory_byte = 1e9", "no assumption memory_byte .*did you mean memory_bytes"),
        ("memory_bytes = -1", "memory_bytes = -1 .* above 0"),
        ('memory_bytes = "80 GB"', "memory_bytes = '80 GB' .* number"),
        ("nodes = 0", "nodes = 0 .* from 1"),
        ('base = "tpu"', "base = 'tpu'"),
        ("product_share = 1.5", "product_share = 1.5 .* share"),
        ("memory_bytes", "not valid TOML"),
    ],
)
def test_a_bad_machine_file_is_an_error(tmp_path, content, message) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        find(str(path), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan.machine", "a100"], "plan.machine = a100 is unknown"),
        (["--plan.machine", "2x8-h100-80gb-x4"], "plan.machine = 2x8-h100-80gb-x4 is unknown"),
        (["--plan.machine", "nowhere.toml"], "plan.machine = nowhere.toml cannot be read"),
        (["--plan.assume", "product_share"], "plan.assume must be NAME=VALUE"),
        (["--plan.assume", "product_share=0"], "plan.assume"),
        (["--plan.assume", "elementwise_share=1"], "elementwise_share = 1"),
        (["--plan.assume", "produkt_share=1"], "did you mean product_share"),
        (["--plan.machin", "here"], "unknown setting plan.machin "),
        (["--plan.rows", "0"], "plan.rows = 0"),
        (["--student.model", "nobody/nothing"], "no config.json for the model 'nobody/nothing'"),
        (["--plan.against", "nowhere"], "plan.against = nowhere is not a run folder"),
        (["--plan.machine"], "--plan.machine needs a value"),
        (["--memory.offload", "pinned"], "memory.offload = pinned"),
        (
            ["--student.adapter=lora", "--plan.machine=h100-80gb-x2", "--plan.resharding=true"],
            "with student.adapter = lora each rank has all of the student",
        ),
    ],
)
def test_bad_input_names_what_is_wrong(capsys, arguments, message) -> None:
    assert run.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_plan_and_run_are_told_apart() -> None:
    config, plan = load(["--preset", "qwen2.5-3b", "--calibrate", "--plan.rows", "7", "--schedule.batch_size=8"])
    assert (config.run.name, config.schedule.batch_size) == ("qwen2.5-3b", 8)
    assert plan.calibrate and plan.rows == 7 and plan.machine == "here"


def test_help_lists_the_plans_settings(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["plan", "--help"])
    assert end.value.code == 0 and "--plan.check_activations" in capsys.readouterr().out


def test_an_override_keeps_the_others() -> None:
    figures = Assumptions([Assumption("a", 1.0, "s", "first"), Assumption("b", 2.0, "share", "second")])
    changed = figures.replaced({"a": 3.0}, "me")
    assert dict(changed) == {"a": 3.0, "b": 2.0} and dict(figures) == {"a": 1.0, "b": 2.0}
    assert [item.why for item in changed.listed()] == ["me", "second"]


def test_calibration_is_measured_kept_and_used(tmp_path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    d, (_, config) = read_dimensions(model), read_config(model)
    told: list[str] = []
    figures = calibrate.measure(d, config, told.append)
    assert len(told) == 5 and all(value > 0 for value in figures.values())
    assert set(figures) <= set(find("here", 1).figures)
    assert find("here", 3).notes and "not calibrated for 3 threads" in find("here", 3).notes[0]
    calibration.keep(figures, 3)
    calibration.keep(figures | {"memory_bandwidth": 5e9, "of_another_version": 1.0}, 1)
    here = find("here", 3)
    assert not here.notes and here.figures["memory_bandwidth"] == figures["memory_bandwidth"]
    assert find("here", 1).figures["memory_bandwidth"] == 5e9 and find("here", 2).notes
    measured = [item.name for item in here.figures.listed() if item.why.startswith("measured on ")]
    assert sorted(measured) == sorted(figures)


def test_a_broken_calibration_is_measured_again(tmp_path) -> None:
    (tmp_path / "machine.json").write_text("{")
    assert calibration.read(1) == ({}, "")
    calibration.keep({"memory_bandwidth": 4e9}, 1)
    assert calibration.read(1)[0] == {"memory_bandwidth": 4e9}


def _row(stage: str, **figures: float) -> dict[str, object]:
    # 2 prompts of 20 tokens, teacher responses of 10, 4 samples of 12.
    counts = {"tokens/sampled": 96, "tokens/discriminator": 2 * (20 + 10 + 4 * 12), "length/student": 12.0}
    return {"stage": stage, "length/teacher": 10.0, "time/rollout": 2.0, "time/total": 9.0, **counts, **figures}


def test_a_run_is_set_beside_its_prediction(tmp_path, capsys) -> None:
    given = loading.load(["--data.eval", "none", "--memory.offload", "file"])
    (tmp_path / "config.toml").write_text(loading.dump(given))
    rows = [_row("warmup"), _row("gad"), _row("gad", **{"time/rollout": 4.0}), _row("gad", **{"time/rollout": 6.0})]
    for row in rows[1:]:
        row |= {"time/reference": 0.5, "time/student": 3.0, "time/student_update": 0.25}
        row |= {"memory/student_held": 5e9, "memory/student_peak": 8e9, "memory/moving_s": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "against.json"
    assert run.main(["plan", "--plan.against", str(tmp_path), "--plan.out", str(out)]) == 0
    items = [item for item in json.loads(out.read_text()) if item["what"] == "time"]
    found = {(item["stage"], item["name"]): item for item in items}
    assert found["gad", "rollout"]["measured"] == 4.0 and found["warmup", "rollout"]["measured"] == 2.0
    assert found["gad", "student"]["measured"] == 3.0 + 0.5 + 0.25, "the reference and the update are the student's"
    assert found["gad", "offload"]["measured"] == 0.5 and found["gad", "offload"]["predicted"] > 0
    peaks = [item for item in json.loads(out.read_text()) if item["what"] == "memory"]
    assert [(item["name"], item["measured"]) for item in peaks] == [("student", 8e9)]
    assert all(item["ratio"] == item["predicted"] / item["measured"] for item in found.values())
    assert "Predicted beside measured" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_a_step_is_predicted_for_its_own_tokens(tmp_path) -> None:
    from gadcore.plan.against import compare
    from tests.support.plan_cases import preset_case

    case = preset_case("smollm2-cpu", "here")
    predicted = []
    for factor in (1, 2):
        row = _row("gad")
        row |= {name: factor * row[name] for name in ("tokens/sampled", "tokens/discriminator")}
        row["time/discriminator"] = 1.0
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        found = {item.name: item.predicted for item in compare(tmp_path, case)}
        predicted.append(found["discriminator"])
    # Twice the prompts: twice the tokens, beside an update that stays.
    assert 1.3 < predicted[1] / predicted[0] < 2
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step that sampled"):
        compare(tmp_path, case)


@pytest.mark.parametrize(("seconds", "told"), [(59.0, "0.983 minutes"), (642.0, "10.7 minutes"), (7200.0, "2 hours")])
def test_a_short_run_is_told_in_minutes(seconds: float, told: str) -> None:
    assert show._span(seconds) == told
