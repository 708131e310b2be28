"""Settings that somebody chose and that change nothing, because another setting, the device or the command says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gadcore.config.data import SPLIT
from gadcore.config.kinds import Section
from gadcore.config.rollout import OwnRollout, VLLMServerRollout
from gadcore.config.settings import AlgorithmSettings, Config

# Why settings have no effect, and which: "section.key", or "section.*" for all of a section.
Reason = tuple[str, tuple[str, ...]]

# What only one of the commands reads.
_OF_SEQKD = ("student.seqkd_lr", "schedule.seqkd_epochs", "schedule.seqkd_steps")
_OF_SODA = (
    "student.soda_lr",
    "schedule.soda_epochs",
    "schedule.soda_steps",
    "algorithm.soda_beta",
    "algorithm.soda_samples",
)
_OF_SFT = ("student.warmup_lr", "schedule.sft_epochs", "schedule.sft_steps")
_ENDINGS = tuple(f"curriculum.{name}" for name in ("end_sft", "end_warmup", "patience", "tolerance"))
_OF_TRAIN = (
    "student.lr",
    "schedule.warmup_epochs",
    "schedule.warmup_steps",
    "schedule.gad_epochs",
    "schedule.gad_steps",
    "rollout.group_size",
    "rollout.parts",
    "rollout.ahead",
    "rollout.ahead_by_turns",
    "discriminator.*",
    "gate.*",
    "convergence.*",
    *_ENDINGS,
    *(
        f"algorithm.{name}"
        for name in AlgorithmSettings.model_fields
        if name not in ("sft_temperature", "soda_beta", "soda_samples")
    ),
)
_OF_CROSS_ENTROPY = ("student.warmup_lr", "algorithm.sft_temperature")
_OF_GAD = (
    "student.lr",
    "convergence.*",
    *(f"algorithm.{name}" for name in ("clip_low", "clip_high", "kl_coef", "normalise_advantage", "loss", "reward")),
    "algorithm.importance_cap",
    "algorithm.score_clip",
    "algorithm.length_debias",
    "algorithm.advantage_std_floor",
    "algorithm.freeze_discriminator",
)
_OF_UPDATES = (
    *(f"discriminator.{name}" for name in ("lr", "betas", "weight_decay", "grad_clip", "label_smoothing")),
    "discriminator.margin_cap",
    "discriminator.score_l2",
    "algorithm.discriminator_steps",
    "algorithm.discriminator_every",
)


def without_effect(
    config: Config, device: str, stages: Sequence[str], steps_per_epoch: int, processes: int = 1
) -> list[str]:
    """A sentence for every reason why settings of a run have no effect that were chosen.

    config: as loading.load gives it, so that a preset's own values are not counted. device: its type, "cpu" or "cuda".
    stages: of the command, as train.progress.stages_of gives them. processes: of the job.
    """
    sentences = told(config, [*_reasons(config, device, stages), *_of_processes(config, stages, processes)])
    return [*sentences, *_lengths(config, stages, steps_per_epoch)]


def told(config: Section, reasons: Iterable[Reason]) -> list[str]:
    """A sentence for every reason with a setting that was set to another value than its default; each setting once."""
    sentences = []
    seen: set[str] = set()
    for reason, keys in reasons:
        idle = [key for key in _chosen(config, keys) if key not in seen]
        seen.update(idle)
        if idle:
            verb = "has" if len(idle) == 1 else "have"
            sentences.append(f"{', '.join(idle)} {verb} no effect: {reason}")
    return sentences


# Engines that are vLLM.
VLLM = ("vllm", "vllm-server")
# What a server that is running has decided itself; rollout.dtype says which it has.
_OF_A_STARTED_SERVER = (
    *(f"rollout.{name}" for name in ("block_size", "max_num_seqs", "prefix_caching", "enforce_eager")),
    *(f"rollout.{name}" for name in ("head_dtype", "batch_invariant", "kv_cache_gib", "gpu_memory_utilization")),
    "rollout.tensor_parallel",
)


def of_vllm(section: str, engine: str, device: str) -> Iterator[Reason]:
    """What vLLM does not read on a device, of the settings in `section`."""
    if engine in VLLM and device == "cuda":
        yield f"on CUDA {section}.gpu_memory_utilization says how much vLLM takes", (f"{section}.kv_cache_gib",)
    if engine in VLLM and device == "cpu":
        yield f"on a CPU {section}.kv_cache_gib says how much vLLM takes", (f"{section}.gpu_memory_utilization",)
        yield "on a CPU a prompt's samples depend on its seed alone in any case", (f"{section}.batch_invariant",)


def _chosen(config: Section, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        section, _, name = key.partition(".")
        settings = getattr(config, section)
        fields = type(settings).model_fields
        for candidate in fields if name == "*" else [name]:
            if candidate in settings.model_fields_set:
                default = fields[candidate].get_default(call_default_factory=True)
                if getattr(settings, candidate) != default:
                    yield f"{section}.{candidate}"


def _reasons(config: Config, device: str, stages: Sequence[str]) -> Iterator[Reason]:
    """Those that hold."""
    if "seqkd" in stages:
        yield "seqkd trains the student alone, by cross-entropy at student.seqkd_lr", (*_OF_TRAIN, *_OF_SFT)
    elif "soda" in stages:
        yield "soda trains the student alone, by DPO at student.soda_lr", _OF_TRAIN
        if "sft" not in stages:
            yield "soda has no cross-entropy before it (schedule.sft_epochs)", _OF_CROSS_ENTROPY
    else:
        yield from _of_training(config)
    for command, keys in (("seqkd", _OF_SEQKD), ("soda", _OF_SODA)):
        if command not in stages:
            yield f"for the baseline only, the command {command}", keys
    if not config.curriculum.every:
        yield "curriculum.every is 0", ("curriculum.*",)
    yield from _of_machine(config, device)
    data = config.data
    if data.eval is None:
        idle = ("data.eval_rows", "data.eval_share", "data.eval_samples", "data.eval_columns")
        yield "data.eval is none, so no rows are held out", idle
    elif data.eval != SPLIT:
        yield f"data.eval = {data.eval} names the held-out rows", ("data.eval_share",)
    else:
        yield "the held-out rows are some of data.train", ("data.eval_columns",)
    if data.train == "builtin" and data.eval in (None, SPLIT, "builtin"):
        yield "the rows that come with gadcore need no column map", ("data.columns",)
    tracker = config.tracking.tracker
    if tracker == "none":
        yield "no tracking.tracker is chosen", ("tracking.project",)
    elif tracker == "tensorboard":
        yield "tensorboard has no projects", ("tracking.project",)


def _of_processes(config: Config, stages: Sequence[str], processes: int) -> Iterator[Reason]:
    if processes == 1:
        yield "there is one process, torchrun starts several", ("distributed.*", "checkpoint.asynchronous")
    alone = {"seqkd", "soda"} & set(stages)
    models = [config.student] if alone else [config.student, config.discriminator]
    if all(model.adapter != "none" for model in models):
        yield "every process has all of a model with an adapter", ("distributed.shard", "distributed.replicate")


def _of_machine(config: Config, device: str) -> Iterator[Reason]:
    yield from of_vllm("rollout", config.rollout.engine, device)
    if isinstance(config.rollout, VLLMServerRollout) and config.rollout.url is not None:
        yield f"rollout.url = {config.rollout.url} names a server that runs already", _OF_A_STARTED_SERVER
    if config.rollout.engine in VLLM and config.vllm.dtype == "float32":
        yield 'rollout.dtype = "float32" has its logits in float32', ("rollout.head_dtype",)
    if config.rollout.engine == "hf":
        idle = ("memory.shared_weights", "rollout.probe_every")
        yield 'rollout.engine = "hf" always samples from the trainer\'s own weights', idle
    elif isinstance(config.rollout, OwnRollout):
        yield f"the class {config.rollout.engine} decides whether it shares weights", ("memory.shared_weights",)
    elif config.rollout.engine == "vllm-server":
        yield "a vLLM server has always a copy of its own", ("memory.shared_weights",)
    elif device == "cuda":
        yield "on CUDA vLLM has always a copy of its own", ("memory.shared_weights",)
    offload = config.memory.offload
    if offload != "file":
        yield f'memory.offload = "{offload}" writes no files: "file" does', ("memory.dir",)
    if offload == "none" or (offload == "auto" and device == "cpu"):
        yield f'memory.offload = "{offload}" moves nothing on this device', ("memory.prefetch",)


def _of_training(config: Config) -> Iterator[Reason]:
    algorithm = config.algorithm
    if not config.rollout.ahead:
        yield "rollout.ahead is 0", ("rollout.ahead_by_turns",)
    if not config.gate.enabled:
        yield "gate.enabled is false", ("gate.*",)
    if not config.convergence.enabled:
        yield "convergence.enabled is false", ("convergence.*",)
    looks = config.curriculum
    if looks.every and not (looks.end_sft or looks.end_warmup):
        yield (
            "neither curriculum.end_sft nor curriculum.end_warmup is set",
            ("curriculum.patience", "curriculum.tolerance"),
        )
    if not config.schedule.has_sft:
        yield "there is no cross-entropy before the warmup (schedule.sft_epochs)", ("curriculum.end_sft",)
    if not algorithm.normalise_advantage:
        yield "algorithm.normalise_advantage is false", ("algorithm.advantage_std_floor",)
    sft = config.schedule.has_sft
    if not algorithm.student_warmup and not sft:
        yield "algorithm.student_warmup is false", _OF_CROSS_ENTROPY
    no_warmup, no_gad = _left_out(config, "warmup"), _left_out(config, "gad")
    if no_warmup:
        yield f"{no_warmup} is 0", (*(() if sft else _OF_CROSS_ENTROPY), "algorithm.critic_warmup")
    if no_gad:
        yield f"{no_gad} is 0", _OF_GAD
    if (no_warmup or not algorithm.discriminator_warmup) and (no_gad or algorithm.freeze_discriminator):
        yield "neither stage updates the discriminator", _OF_UPDATES


def _left_out(config: Config, stage: str) -> str | None:
    """The setting that leaves a stage out; None where it takes place."""
    names = (f"{stage}_epochs", f"{stage}_steps")
    return next((f"schedule.{name}" for name in names if getattr(config.schedule, name) == 0), None)


def _lengths(config: Config, stages: Sequence[str], steps_per_epoch: int) -> Iterator[str]:
    """Epochs that a limit cuts off which was not chosen with them, and limits that the epochs never reach."""
    schedule = config.schedule
    for stage in stages:
        epochs, limit = f"{stage}_epochs", f"{stage}_steps"
        steps, most = getattr(schedule, epochs) * steps_per_epoch, getattr(schedule, limit)
        chosen = schedule.model_fields_set & {epochs, limit}
        if most is None:
            continue
        if chosen == {epochs} and most < steps:
            yield (
                f"schedule.{epochs} has no effect: the stage ends after {most} of its {steps} steps, by "
                f"schedule.{limit}; none takes that limit away"
            )
        if limit in chosen and most > steps and (epochs not in chosen or not steps):
            yield (
                f"schedule.{limit} has no effect: the stage ends after {steps} steps, by "
                f"schedule.{epochs} = {getattr(schedule, epochs)}"
            )
