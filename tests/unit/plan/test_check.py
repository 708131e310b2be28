"""A run is refused, or lowered, by what the planner predicts, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gadcore import run
from gadcore.config.loading import load, presets
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.plan import calibration, machine
from gadcore.plan.check import Fitted, fit
from gadcore.plan.machine import h100
from gadcore.plan.workload import Counted
from tests.support.builders import groups
from tests.support.runs import tiny_arguments

STAGES = ("warmup", "gad")
GB24 = {"memory_bytes": 24e9, "host_memory_bytes": 128e9, "memory_bandwidth": 1e12, "host_link": 25e9}


@pytest.fixture(autouse=True)
def _no_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "path", lambda: tmp_path / "machine.json")


def on_gpu(monkeypatch, **figures: float) -> None:
    """Runs start on a machine with one H100, or with other figures in place of its, on as many rows as the paper's."""
    monkeypatch.setattr(Counted, "of", classmethod(lambda cls, rows, config: cls(192_014, *_means(config), "test")))
    gpu = h100(1, 1, "a GPU")
    gpu = replace(gpu, figures=gpu.figures.replaced(figures, "test"))
    monkeypatch.setattr(machine, "find", lambda *args, **kwargs: gpu)


def _means(config: Config) -> tuple[float, float]:
    return min(110.0, config.data.max_prompt_tokens / 2), min(320.0, config.data.max_response_tokens / 2)


WHOLE = ["--student.adapter", "none", "--discriminator.adapter", "none"]


def fitted(*arguments: str, stages=STAGES) -> Fitted:
    config = load(arguments)
    return fit(config, config.student.model, groups(3), stages)


def test_a_run_that_fits_stays_as_it_is(monkeypatch) -> None:
    config = load([*WHOLE, "--algorithm.kl_coef", "0.001"])
    same = fit(config, config.student.model, groups(3), STAGES)
    assert same.config == config and same.notes == []
    assert len(same.lines) == 9 and all(line.startswith("memory, predicted, ") for line in same.lines)
    assert "student.optimizer" in same.lines[6] and "activations and head" in same.lines[5]
    assert "is the fullest state" in same.lines[-1] and "GB left" in same.lines[-1]
    assert set(same.step_seconds) == set(STAGES) and 0 < same.step_seconds["warmup"] < same.step_seconds["gad"]


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("figures", [{}, GB24], ids=["80 GB", "24 GB"])
def test_every_preset_fits_or_is_refused_with_advice(monkeypatch, name, figures) -> None:
    on_gpu(monkeypatch, **figures)
    fits = {
        "smollm2-gpu",
        "smollm2-cpu",
        "qwen2.5-3b-lora",
        "qwen2.5-3b-qlora",
        *([] if figures else ["qwen2.5-3b", "llama-3.2-3b"]),
    }
    if not figures:
        fits |= {name for name in presets() if name.endswith(("-lora", "-qlora"))}
    if name in fits | {"paper", "soda"}:
        done = fitted("--preset", name)
        assert done.config.schedule.activation_checkpointing != "auto" and done.lines
        if name == "qwen2.5-3b":
            assert done.config.schedule.micro_batch_tokens == 16384 and done.notes == []
        return
    with pytest.raises(UserError, match=r"the state \w+ is predicted to need .* GiB of .* GiB allowed") as refused:
        fitted("--preset", name)
    advice = str(refused.value)
    assert "plan` with the same settings" in advice and "memory.limit_gib" in advice
    if name in ("qwen2.5-7b", "llama-3.1-8b") and not figures:
        assert "set student.master = host and discriminator.master = host" in advice


def test_advice_that_is_followed_makes_a_7b_fit(monkeypatch) -> None:
    on_gpu(monkeypatch)
    done = fitted(*SEVEN_B)
    assert done.config.student.master == "host" and done.lines


SEVEN_B = ["--preset", "qwen2.5-7b", "--student.master", "host", "--discriminator.master", "host"]


def test_a_presets_own_value_is_lowered_and_told(monkeypatch) -> None:
    on_gpu(monkeypatch, memory_bytes=59e9)
    done = fitted(*SEVEN_B)
    assert done.config.schedule.micro_batch_tokens in (4096, 8192)
    (note,) = [note for note in done.notes if "micro_batch_tokens" in note]
    assert f"= {done.config.schedule.micro_batch_tokens}, not 16384" in note and "the state student" in note
    # Nobody has chosen it: a run that is resumed elsewhere may change it again.
    assert done.config.schedule.model_fields_set == load(SEVEN_B).schedule.model_fields_set


def test_what_a_user_has_set_is_never_changed(monkeypatch, tmp_path) -> None:
    on_gpu(monkeypatch, memory_bytes=59e9)
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "qwen2.5-7b"\n[schedule]\nmicro_batch_tokens = 16384\n')
    for arguments in ([*SEVEN_B, "--schedule.micro_batch_tokens", "16384"], ["--config", str(mine), *SEVEN_B[2:]]):
        with pytest.raises(UserError, match=r"the state student .*\n.*set schedule.micro_batch_tokens = (4096|8192)"):
            fitted(*arguments)
    kept = [*SEVEN_B, "--schedule.activation_checkpointing", "full"]
    assert fitted(*kept).config.schedule.activation_checkpointing == "full"


def test_a_cache_that_holds_no_sequence_is_made_larger_or_told(monkeypatch) -> None:
    on_gpu(monkeypatch, memory_bytes=12e9)
    # The preset's share comes to less than weights and buffers.
    done = fitted("--preset", "smollm2-gpu")
    assert 0.3 < done.config.vllm.gpu_memory_utilization < 0.6
    assert any("rollout.gpu_memory_utilization = 0." in note and "not 0.30" in note for note in done.notes)
    # What vLLM takes is assumed: a share that somebody has chosen is left to it.
    done = fitted("--preset", "smollm2-gpu", "--rollout.gpu_memory_utilization", "0.2")
    assert done.config.vllm.gpu_memory_utilization == 0.2 and "one sequence of full length" in done.notes[0]


def test_a_limit_is_a_limit(monkeypatch) -> None:
    on_gpu(monkeypatch)
    with pytest.raises(UserError, match="of 20.00 GiB allowed"):
        fitted("--preset", "qwen2.5-3b", "--memory.limit_gib", "20")
    on_gpu(monkeypatch, memory_bytes=24e9)
    assert fitted("--preset", "qwen2.5-3b", "--memory.limit_gib", "100").lines


def test_the_baseline_needs_no_discriminator(monkeypatch) -> None:
    on_gpu(monkeypatch)
    done = fitted("--preset", "qwen2.5-3b", stages=("seqkd",))
    assert not any("discriminator" in line or "reference" in line for line in done.lines)
    assert any(line.startswith("memory, predicted, student_update") for line in done.lines)


def test_a_model_that_cannot_be_read_is_told_and_not_guessed(tmp_path) -> None:
    config = load([])
    done = fit(config, str(tmp_path / "none"), groups(3), STAGES)
    assert done.config == config and done.lines == [] and done.step_seconds == {}
    assert done.notes[0].startswith("the memory of this run is not predicted: ")


def test_a_host_that_cannot_hold_the_masters_is_told(monkeypatch) -> None:
    on_gpu(monkeypatch, host_memory_bytes=120e9)
    with pytest.raises(UserError, match="what is moved off needs .* more than a node's host has"):
        fitted(*SEVEN_B)


def test_nothing_is_loaded_for_a_run_that_does_not_fit(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def load_nothing(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("gadcore.train.build.build", load_nothing)
    arguments = [*tiny_arguments(tmp_path), "--memory.limit_gib", "0.1"]
    assert run.main(arguments) == 2
    told = capsys.readouterr().err
    assert "of 0.10 GiB allowed" in told and not Path("runs").exists()
    # A dry run shows what would run, and then the same.
    assert run.main([*arguments, "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert "micro_batch_tokens" in shown.out and "of 0.10 GiB allowed" in shown.err
