"""Settings that somebody chose and that change nothing, because another setting, the device or the command says so."""

from __future__ import annotations

from collections.abc import Iterator

from gadcore.config.settings import AlgorithmSettings, Config

# What only one of the commands reads.
_OF_SEQKD = ("student.seqkd_lr", "schedule.seqkd_epochs", "schedule.seqkd_steps")
_OF_TRAIN = (
    "student.lr",
    "student.warmup_lr",
    "schedule.warmup_epochs",
    "schedule.warmup_steps",
    "schedule.gad_epochs",
    "schedule.gad_steps",
    "discriminator.*",
    "gate.*",
    "convergence.*",
    *(f"algorithm.{name}" for name in AlgorithmSettings.model_fields if name != "sft_temperature"),
)
_OF_ADAMW = ("lr", "betas", "weight_decay", "grad_clip")


def without_effect(config: Config, device: str, command: str) -> list[str]:
    """A sentence for every reason why settings have no effect that were chosen, and are not what they would be anyway.

    config: as loading.load gives it, so that a preset's own values are not counted. device: its type, "cpu" or "cuda".
    command: "train" or "seqkd".
    """
    sentences = []
    told: set[str] = set()
    for reason, keys in _reasons(config, device, command):
        idle = [key for key in _chosen(config, keys) if key not in told]
        told.update(idle)
        if idle:
            verb = "has" if len(idle) == 1 else "have"
            sentences.append(f"{', '.join(idle)} {verb} no effect: {reason}")
    return sentences


def _chosen(config: Config, keys: tuple[str, ...]) -> Iterator[str]:
    """Those of the keys ("section.*": all of a section) that were set to another value than their default."""
    for key in keys:
        section, _, name = key.partition(".")
        settings = getattr(config, section)
        fields = type(settings).model_fields
        for candidate in fields if name == "*" else [name]:
            if candidate in settings.model_fields_set:
                default = fields[candidate].get_default(call_default_factory=True)
                if getattr(settings, candidate) != default:
                    yield f"{section}.{candidate}"


def _reasons(config: Config, device: str, command: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(why, the settings that have no effect for that reason), for the reasons that hold."""
    if command == "seqkd":
        yield "seqkd trains the student alone, by cross-entropy at student.seqkd_lr", _OF_TRAIN
    else:
        yield "for the baseline only, the command seqkd", _OF_SEQKD
        yield from _of_training(config)
    yield from _of_machine(config, device)
    if config.data.eval is None:
        yield "data.eval is none, so no rows are held out", ("data.eval_rows",)
    if config.tracking.tracker == "none":
        yield "no tracking.tracker is chosen", ("tracking.project",)


def _of_machine(config: Config, device: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if config.rollout.engine == "vllm" and device == "cuda":
        yield "on CUDA rollout.gpu_memory_utilization says how much vLLM takes", ("rollout.kv_cache_gib",)
    if config.rollout.engine == "vllm" and device == "cpu":
        yield "on a CPU rollout.kv_cache_gib says how much vLLM takes", ("rollout.gpu_memory_utilization",)
    if config.rollout.engine == "hf":
        yield 'rollout.engine = "hf" always samples from the trainer\'s own weights', ("memory.shared_weights",)
    elif device == "cuda":
        yield "on CUDA vLLM has always a copy of its own", ("memory.shared_weights",)
    offload = config.memory.offload
    if offload != "file":
        yield f'memory.offload = "{offload}" writes no files: "file" does', ("memory.dir",)
    if offload == "none" or (offload == "auto" and device == "cpu"):
        yield f'memory.offload = "{offload}" moves nothing on this device', ("memory.prefetch",)


def _of_training(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    algorithm, schedule = config.algorithm, config.schedule
    if not config.gate.enabled:
        yield "gate.enabled is false", ("gate.*",)
    if not config.convergence.enabled:
        yield "convergence.enabled is false", ("convergence.*",)
    if not algorithm.normalise_advantage:
        yield "algorithm.normalise_advantage is false", ("algorithm.advantage_std_floor",)
    if not algorithm.student_warmup:
        yield "algorithm.student_warmup is false", ("student.warmup_lr", "algorithm.sft_temperature")
    if schedule.warmup_epochs == 0:
        yield (
            "schedule.warmup_epochs is 0",
            ("schedule.warmup_steps", "student.warmup_lr", "algorithm.sft_temperature", "algorithm.critic_warmup"),
        )
    if schedule.gad_epochs == 0:
        yield "schedule.gad_epochs is 0", ("schedule.gad_steps", "student.lr", "convergence.*")
    if not algorithm.discriminator_warmup and algorithm.freeze_discriminator:
        never = (*_OF_ADAMW, "label_smoothing", "margin_cap")
        yield (
            "neither stage updates the discriminator",
            (
                *(f"discriminator.{name}" for name in never),
                "algorithm.discriminator_steps",
                "algorithm.discriminator_every",
            ),
        )
