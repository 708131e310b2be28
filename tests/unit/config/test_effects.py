"""Settings that were chosen and change nothing are told, each for its reason, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.config.effects import without_effect
from gadcore.config.loading import load, presets

STAGES = {"train": ("warmup", "gad"), "seqkd": ("seqkd",), "soda": ("soda",)}
PER_EPOCH = 10


# The order of the paper in the default job, and models that are trained as a whole.
ORDER = ("schedule.sft_epochs=0", "algorithm.student_warmup=true", "student.adapter=none", "discriminator.adapter=none")


def told(*settings: str, device: str = "cpu", command: str = "train") -> list[str]:
    argv = {setting.split("=")[0]: setting for setting in (*ORDER, *settings)}
    return without_effect(load([f"--{setting}" for setting in argv.values()]), device, STAGES[command], PER_EPOCH)


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("command", ["train", "seqkd", "soda"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_preset_alone_tells_nothing(name: str, command: str, device: str) -> None:
    assert without_effect(load(["--preset", name]), device, STAGES[command], PER_EPOCH) == []


@pytest.mark.parametrize(
    ("settings", "key", "mended"),
    [
        (["memory.dir=x"], "memory.dir", ["memory.offload=file"]),
        (["memory.prefetch=false"], "memory.prefetch", ["memory.offload=file"]),
        (["tracking.project=x"], "tracking.project", ["tracking.tracker=wandb"]),
        (["tracking.project=x", "tracking.tracker=tensorboard"], "tracking.project", ["tracking.tracker=mlflow"]),
        (["gate.low=0.6"], "gate.low", ["gate.enabled=true"]),
        (["convergence.every=3"], "convergence.every", ["convergence.enabled=true"]),
        (["data.eval=none"], "data.eval_rows", ["data.eval=builtin"]),
        (["algorithm.normalise_advantage=false"], "algorithm.advantage_std_floor", []),
        (["algorithm.student_warmup=false"], "student.warmup_lr", []),
        (["schedule.warmup_epochs=0"], "algorithm.sft_temperature", []),
        (["schedule.warmup_steps=0"], "student.warmup_lr", []),
        (["schedule.gad_epochs=0"], "student.lr", []),
        (["schedule.gad_steps=0"], "student.lr", []),
        (["schedule.gad_epochs=0"], "algorithm.reward", []),
        (["schedule.gad_steps=0"], "algorithm.importance_cap", []),
        (["rollout.ahead_by_turns=true"], "rollout.ahead_by_turns", ["rollout.ahead=1", "algorithm.importance_cap=2"]),
        (["schedule.gad_steps=0", "schedule.warmup_steps=0"], "discriminator.margin_cap", []),
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
        "algorithm.reward": "m:f",
        "algorithm.importance_cap": 2,
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
    assert len(told("rollout.batch_invariant=true")) == 1
    assert told("rollout.batch_invariant=true", device="cuda") == []


def test_the_dtype_of_logits_is_a_setting_of_engines_in_bfloat16() -> None:
    (sentence,) = told("rollout.head_dtype=bfloat16")
    assert sentence == 'rollout.head_dtype has no effect: rollout.dtype = "float32" has its logits in float32'
    assert told("rollout.head_dtype=bfloat16", "rollout.dtype=bfloat16") == []
    for device, engine, count in (("cuda", "vllm", 1), ("cpu", "hf", 1), ("cpu", "vllm", 0), ("cpu", "vllm-server", 1)):
        assert len(told("memory.shared_weights=false", f"rollout.engine={engine}", device=device)) == count
    assert told("memory.prefetch=false", device="cuda") == []


def test_a_server_that_runs_has_settings_of_its_own() -> None:
    chosen = ("rollout.engine=vllm-server", "rollout.max_num_seqs=7", "rollout.tensor_parallel=2")
    assert told(*chosen) == []
    (sentence,) = told(*chosen, "rollout.url=http://127.0.0.1:8000")
    assert sentence == (
        "rollout.max_num_seqs, rollout.tensor_parallel have no effect: rollout.url = http://127.0.0.1:8000 names a "
        "server that runs already"
    )
    assert len(told("rollout.engine=hf", "rollout.probe_every=3")) == 1


def test_settings_of_the_other_command_are_told_in_one_sentence() -> None:
    (sentence,) = told("student.seqkd_lr=1e-3", "schedule.seqkd_steps=4")
    assert sentence == (
        "student.seqkd_lr, schedule.seqkd_steps have no effect: for the baseline only, the command seqkd"
    )
    settings = ["student.lr=1e-3", "rollout.group_size=3", "discriminator.lr=1e-3", "algorithm.kl_coef=0.1"]
    (sentence,) = told(*settings, "algorithm.sft_temperature=2", command="seqkd")
    assert sentence.startswith(
        "student.lr, rollout.group_size, discriminator.lr, algorithm.kl_coef have no effect: seqkd trains"
    )


def test_a_value_that_would_hold_anyway_is_not_told(tmp_path: Path) -> None:
    assert told("gate.low=0.55", "student.seqkd_lr=5e-6") == []
    path = tmp_path / "run.toml"
    path.write_text("[gate]\nlow = 0.6\n")
    assert len(without_effect(load(["--config", str(path)]), "cpu", STAGES["train"], PER_EPOCH)) == 1
    assert without_effect(load([], saved=path), "cpu", STAGES["train"], PER_EPOCH) == []


def test_epochs_that_a_limit_of_the_preset_cuts_off() -> None:
    # smollm2-cpu limits the warmup to 12 steps and the GAD stage to 16.
    assert told("schedule.gad_epochs=3") == [
        "schedule.gad_epochs has no effect: the stage ends after 16 of its 30 steps, by schedule.gad_steps; none takes "
        "that limit away"
    ]
    assert len(told("schedule.warmup_epochs=2")) == 1
    assert told("schedule.gad_epochs=3", "schedule.gad_steps=none") == []
    assert told("schedule.gad_epochs=3", "schedule.gad_steps=25") == []  # both were chosen together
    assert len(told("schedule.gad_epochs=2")) == 1  # the default as well
    assert told("schedule.seqkd_epochs=7", command="seqkd") == []


def test_a_limit_that_the_epochs_never_reach() -> None:
    assert told("schedule.gad_steps=21") == [
        "schedule.gad_steps has no effect: the stage ends after 20 steps, by schedule.gad_epochs = 2"
    ]
    assert told("schedule.gad_steps=20") == told("schedule.gad_steps=3") == []
    (sentence,) = told("schedule.gad_epochs=0", "schedule.gad_steps=3")
    assert sentence.startswith("schedule.gad_steps has no effect: the stage ends after 0 steps")


def test_sft_gives_the_cross_entropy_settings_their_effect() -> None:
    settings = ("algorithm.student_warmup=false", "student.warmup_lr=1e-3")
    assert any("student.warmup_lr has no effect" in sentence for sentence in told(*settings))
    assert told(*settings, "schedule.sft_epochs=1") == []
    assert any("schedule.sft_epochs" in sentence for sentence in told("schedule.sft_epochs=1", command="seqkd"))


def test_a_mesh_cuts_no_model_with_an_adapter() -> None:
    config = load(["--distributed.replicate=2", "--student.adapter=lora", "--discriminator.adapter=lora"])
    (sentence,) = without_effect(config, "cpu", STAGES["train"], PER_EPOCH, 4)
    assert sentence == "distributed.replicate has no effect: every process has all of a model with an adapter"
    whole = load(["--distributed.replicate=2", "--student.adapter=lora", "--discriminator.adapter=none"])
    assert without_effect(whole, "cpu", STAGES["train"], PER_EPOCH, 4) == []
    (sentence,) = without_effect(whole, "cpu", STAGES["seqkd"], PER_EPOCH, 4)
    assert sentence.startswith("distributed.replicate has no effect")
