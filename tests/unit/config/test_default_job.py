"""The preset of a command line that names none: by the machine, and said where it is another than the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gadcore import run
from gadcore.config import default_job
from gadcore.config.default_job import default_preset
from gadcore.config.driver import Driver, Gpu
from gadcore.config.loading import load
from gadcore.plan import settings

H100 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, 84_000_000_000, (9, 0)),))


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(default_job, "find_driver", lambda: H100)


@pytest.mark.parametrize(
    ("arguments", "preset"),
    [
        ([], "smollm2-gpu"),
        (["--schedule.gad_steps", "3"], "smollm2-gpu"),
        (["--run.device", "cuda"], "smollm2-gpu"),
        (["--run.device=cpu"], "smollm2-cpu"),
        # Where another preset or file is named, none is meant.
        (["--preset", "qwen2.5-3b"], "smollm2-cpu"),
        (["--config", "mine.toml"], "smollm2-cpu"),
    ],
)
def test_a_gpu_has_a_default_job_of_its_own(on_gpu, arguments, preset) -> None:
    assert default_preset(arguments) == preset


@pytest.mark.parametrize("driver", [None, replace(H100, gpus=())])
def test_without_a_gpu_it_is_the_cpus(monkeypatch, driver) -> None:
    monkeypatch.setattr(default_job, "find_driver", lambda: driver)
    assert default_preset([]) == "smollm2-cpu"


def test_a_gpu_that_is_hidden_is_none(on_gpu, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_preset([]) == "smollm2-cpu"


def test_a_run_says_which_it_takes_and_plans_the_same(on_gpu, monkeypatch, capsys) -> None:
    given = []

    def stop(config: object) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(run, "_prepare", stop)
    monkeypatch.setattr(run.loading, "load", lambda *args, **kwargs: given.append(kwargs["default"]) or load([]))
    for arguments in ([], ["--preset", "smollm2-cpu"]):
        with pytest.raises(SystemExit):
            run.main(arguments)
    assert given == ["smollm2-gpu", "smollm2-cpu"]
    assert capsys.readouterr().err.count("--preset smollm2-gpu; --run.device cpu means smollm2-cpu") == 1


def test_the_plan_is_of_the_job_that_would_run(on_gpu) -> None:
    assert settings.load([])[0].run.name == "smollm2-gpu"
    assert settings.load(["--run.device", "cpu"])[0].run.name == "smollm2-cpu"


def test_the_gpu_preset_is_the_cpus_job_in_other_sizes() -> None:
    gpu, cpu = load(["--preset", "smollm2-gpu"]), load(["--preset", "smollm2-cpu"])
    assert gpu.student.model == cpu.student.model and gpu.data.train == cpu.data.train == "builtin"
    assert gpu.student.autocast == gpu.discriminator.autocast == gpu.vllm.dtype == "bfloat16"
    assert gpu.schedule.batch_size > cpu.schedule.batch_size and gpu.rollout.group_size > cpu.rollout.group_size
    assert gpu.schedule.has_sft and cpu.schedule.has_sft
    assert not gpu.algorithm.student_warmup and not cpu.algorithm.student_warmup
