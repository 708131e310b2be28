"""Settings that were chosen and change nothing are told, each for its reason, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.config.effects import without_effect
from gadcore.config.loading import load, presets


def told(*settings: str, device: str = "cpu", command: str = "train") -> list[str]:
    return without_effect(load([f"--{setting}" for setting in settings]), device, command)


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("command", ["train", "seqkd"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_preset_alone_tells_nothing(name: str, command: str, device: str) -> None:
    assert without_effect(load(["--preset", name]), device, command) == []


@pytest.mark.parametrize(
    ("settings", "key", "mended"),
    [
        (["memory.dir=x"], "memory.dir", ["memory.offload=file"]),
        (["memory.prefetch=false"], "memory.prefetch", ["memory.offload=file"]),
        (["tracking.project=x"], "tracking.project", ["tracking.tracker=tensorboard"]),
        (["gate.low=0.6"], "gate.low", ["gate.enabled=true"]),
        (["convergence.every=3"], "convergence.every", ["convergence.enabled=true"]),
        (["data.eval=none"], "data.eval_rows", ["data.eval=builtin"]),
        (["algorithm.normalise_advantage=false"], "algorithm.advantage_std_floor", []),
        (["algorithm.student_warmup=false"], "student.warmup_lr", []),
        (["schedule.warmup_epochs=0"], "algorithm.sft_temperature", []),
        (["schedule.gad_epochs=0"], "student.lr", []),
        (
            ["algorithm.discriminator_warmup=false", "algorithm.freeze_discriminator=true"],
            "discriminator.margin_cap",
            ["algorithm.freeze_discriminator=false"],
        ),
    ],
)
def test_what_another_setting_overrides(settings: list[str], key: str, mended: list[str]) -> None:
    values = {
        "data.eval_rows": 3,
        "algorithm.advantage_std_floor": 1e-3,
        "student.warmup_lr": 0.1,
        "algorithm.sft_temperature": 2,
        "student.lr": 0.1,
        "discriminator.margin_cap": 3,
    }
    chosen = [f"{key}={values[key]}"] if key in values else []
    (sentence,) = told(*settings, *chosen)
    assert sentence.startswith(f"{key} has no effect: ")
    # The reason is gone with what mends it, or with the setting that gave it.
    assert told(*(settings + chosen + mended if mended else chosen)) == []


def test_what_the_device_overrides() -> None:
    (sentence,) = told("rollout.kv_cache_gib=3", device="cuda")
    assert sentence == (
        "rollout.kv_cache_gib has no effect: on CUDA rollout.gpu_memory_utilization says how much vLLM takes"
    )
    assert told("rollout.kv_cache_gib=3") == []
    assert len(told("rollout.gpu_memory_utilization=0.3")) == 1
    assert told("rollout.gpu_memory_utilization=0.3", device="cuda") == []
    for device, engine, count in (("cuda", "vllm", 1), ("cpu", "hf", 1), ("cpu", "vllm", 0)):
        assert len(told("memory.shared_weights=false", f"rollout.engine={engine}", device=device)) == count
    assert told("memory.prefetch=false", device="cuda") == []


def test_settings_of_the_other_command_are_told_in_one_sentence() -> None:
    (sentence,) = told("student.seqkd_lr=1e-3", "schedule.seqkd_steps=4")
    assert sentence == (
        "student.seqkd_lr, schedule.seqkd_steps have no effect: for the baseline only, the command seqkd"
    )
    settings = ["student.lr=1e-3", "discriminator.lr=1e-3", "gate.low=0.6", "algorithm.kl_coef=0.1"]
    (sentence,) = told(*settings, "algorithm.sft_temperature=2", command="seqkd")
    assert sentence.startswith("student.lr, discriminator.lr, gate.low, algorithm.kl_coef have no effect: seqkd trains")


def test_a_value_that_would_hold_anyway_is_not_told(tmp_path: Path) -> None:
    assert told("gate.low=0.55", "student.seqkd_lr=5e-6") == []
    path = tmp_path / "run.toml"
    path.write_text("[gate]\nlow = 0.6\n")
    assert len(without_effect(load(["--config", str(path)]), "cpu", "train")) == 1
    assert without_effect(load([], saved=path), "cpu", "train") == []
