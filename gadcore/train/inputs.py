"""What is known of a run before a model is loaded: its rows, through the chat templates of its models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gadcore.config.data import SPLIT
from gadcore.config.device import device_of, quiet
from gadcore.config.effects import without_effect
from gadcore.config.settings import Config
from gadcore.data import reasoning
from gadcore.data.batches import DataReport, Loader
from gadcore.data.encoded import Rows, Subset, split_off, token_lengths
from gadcore.data.groups import Group
from gadcore.data.sources import Source
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.models.loading import cache_dir
from gadcore.models.spec import ModelSpec
from gadcore.train.progress import has_discriminator, stage_steps

# Rows whose lengths in a discriminator's own tokens are counted at the start, which takes some seconds.
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before a model is loaded.

    train, held_out: made one by one as they are asked for, where they are many.
    discriminator: None in a run that trains none. notes: what happened to rows on the way, in sentences.
    warnings: those of the notes that must not be missed. report: of the training rows.
    """

    student: ModelSpec
    discriminator: ModelSpec | None
    train: Sequence[Group]
    held_out: Sequence[Group]
    notes: list[str]
    warnings: list[str]
    report: DataReport


def read_inputs(config: Config, stages: Sequence[str], world: World = ALONE) -> Inputs:
    """Reads the data through the student's chat template. Raises UserError for whatever is wrong with it.

    world: the first process of it fills the caches, the others read them.
    """
    if world.size == 1:
        return _read_inputs(config, stages, _say)
    found = None
    for first in (True, False):
        with world.agreeing():
            if world.is_first == first:
                found = _read_inputs(config, stages, _say if first else _nothing, world.size)
    assert found is not None
    return found


def _read_inputs(config: Config, stages: Sequence[str], tell: Callable[[str], None], processes: int = 1) -> Inputs:
    quiet()
    data = config.data
    # The rows first: a broken line is told before a model is looked for.
    rows = Rows(Source.find(data.train, "train"), data, data.train_rows)
    held_out_rows = None
    if data.eval is not None and data.eval != SPLIT:
        columns = data.columns if data.eval_columns is None else data.eval_columns
        as_eval = data.model_copy(update={"columns": columns})
        held_out_rows = Rows(Source.find(data.eval, "eval"), as_eval, data.eval_rows, "data.eval_columns")
    device = device_of(config)
    try:
        student = ModelSpec.resolve(
            config.student.model, system_prompt=data.system_prompt, arguments=data.template_arguments
        )
        if unused := student.template.unused_arguments():
            raise UserError(
                f"data.template_arguments has {', '.join(unused)}, which the template of {student.path} does not read: "
                "leave it out, or look for its name in that template"
            )
        discriminator = _discriminator_spec(config, student) if has_discriminator(stages) else None
    except UserError:
        for read in filter(None, (rows, held_out_rows)):
            read.check()
        raise
    limit = student.context_tokens
    if limit and config.context_tokens > limit:
        raise UserError(
            f"prompt and response limits need a context of {config.context_tokens} tokens, the model {student.path} "
            f"has {limit}: lower data.max_prompt_tokens or data.max_response_tokens"
        )
    train, report, told = rows.groups(student.template, cache_dir(), tell)
    told += reasoning.check(data.reasoning, student.template, report.reasoned, report.rows)
    warnings = [f"training: {sentence}" for sentence in report.warnings()]
    told += [f"training: {sentence}" for sentence in report.sentences()]
    held_out: Sequence[Group] = []
    if held_out_rows is not None:
        held_out, of_held_out, more = held_out_rows.groups(student.template, cache_dir(), tell)
        warnings += [f"held out: {sentence}" for sentence in of_held_out.warnings()]
        told += [*more, *(f"held out: {sentence}" for sentence in of_held_out.sentences())]
    elif data.eval == SPLIT:
        train, held_out = split_off(train, data.eval_share, data.eval_rows, config.run.seed)
        told.append(_split_note(config, len(train), len(held_out)))
    loader = Loader(train, config.schedule.batch_size, config.run.seed)
    notes = without_effect(config, device.type, stages, loader.steps_per_epoch, processes)
    notes += student.notes()
    if discriminator is not None and discriminator is not student:
        notes += discriminator.template.notes
    notes += told
    if discriminator is not None:
        if config.convergence.enabled and len(held_out) < 4:
            raise UserError(
                f"convergence.enabled needs 4 held-out rows or more, there are {len(held_out)}: give more by data.eval "
                "and data.eval_rows, or switch it off"
            )
        notes += _few_held_out(config, len(held_out))
        if discriminator is not student:
            _check_context(config, discriminator, student, [*_longest(train), *_longest(held_out)])
    return Inputs(student, discriminator, train, held_out, notes, warnings, report)


def _say(text: str) -> None:
    """On its way to a run's view, which is not there yet."""
    print(f"gadcore: {text}", file=sys.stderr, flush=True)


def _nothing(text: str) -> None:
    """Another process tells it."""


def _split_note(config: Config, train: int, held_out: int) -> str:
    data = config.data
    most = f", data.eval_rows = {data.eval_rows} at most" if data.eval_rows else ""
    return (
        f"{held_out} of the {train + held_out} rows of {data.train} are held out and not trained on "
        f"(data.eval_share = {data.eval_share:g}{most}); data.eval names other held-out rows, or none"
    )


def _discriminator_spec(config: Config, student: ModelSpec) -> ModelSpec:
    """The student's own where they begin as the same model: it is looked for, and checked, once."""
    if config.discriminator_model == config.student.model:
        return student
    data = config.data
    return ModelSpec.resolve(
        config.discriminator_model, system_prompt=data.system_prompt, arguments=data.template_arguments
    )


def _check_context(config: Config, spec: ModelSpec, student: ModelSpec, groups: Sequence[Group]) -> None:
    """Whether another model's context holds what it will be shown, as far as that is known before the first sample."""
    limit = spec.context_tokens
    if limit is None:
        return
    advice = "lower data.max_prompt_tokens or data.max_response_tokens, or choose another discriminator.model"
    if spec.same_tokens(student):
        needed = config.data.max_prompt_tokens + config.data.max_response_tokens
        if needed > limit:
            raise UserError(
                f"prompt and response limits need a context of {needed} tokens, the discriminator {spec.path} has "
                f"{limit}: {advice}"
            )
        return
    template = spec.template
    for group in groups:
        needed = len(template.prompt_ids(group.prompt.messages))
        needed += len(template.response_ids(group.teacher.text, finished=group.teacher.finished))
        if needed > limit:
            raise UserError(
                f"row {group.prompt.index} (from 0) with its teacher response is {needed} tokens of the discriminator "
                f"{spec.path}, whose context has {limit}: {advice}"
            )


def _longest(groups: Sequence[Group]) -> Sequence[Group]:
    """Those to be looked at one by one: all, or of very many the longest ones of the student's tokens.

    The discriminator tells any other that does not fit when its turn comes.
    """
    if len(groups) <= _LOOKED_AT:
        return groups
    prompts, responses = token_lengths(groups)
    return Subset(groups, np.sort(np.argsort(prompts + responses, kind="stable")[-_LOOKED_AT:]))


def _few_held_out(config: Config, rows: int) -> list[str]:
    return [
        f"{name}.rows = {section.rows}, but only {rows} rows are held out: all of them are used"
        for name, section in (("gate", config.gate), ("convergence", config.convergence))
        if section.enabled and rows < section.rows
    ]


def planned_steps(config: Config, stages: Sequence[str], inputs: Inputs) -> dict[str, int]:
    """{stage: its steps}."""
    loader = Loader(inputs.train, config.schedule.batch_size, config.run.seed)
    return stage_steps(config, stages, loader.steps_per_epoch)


def describe_plan(config: Config, stages: Sequence[str], inputs: Inputs) -> str:
    """What the run would do, in lines."""
    lines = [
        f"student {config.student.model} ({inputs.student.path})",
        f"rows: {len(inputs.train)} for training, {len(inputs.held_out)} held out",
        *inputs.notes,
    ]
    rows, size = len(inputs.train), config.schedule.batch_size
    begin = 0
    for stage, count in planned_steps(config, stages, inputs).items():
        # An epoch's last batch is smaller, and a stage goes on where the one before it ended.
        first, last = (_prompts(step, rows, size) for step in (begin, begin + count))
        begin += count
        line = f"{stage}: {count} steps of {min(size, rows)} prompts"
        if rows % size and rows > size:
            line += f" (an epoch's last one: {rows % size})"
        if stage == "gad" or (stage == "warmup" and config.algorithm.discriminator_warmup):
            samples = (last - first) * config.rollout.group_size
            line += f", {samples} samples of at most {config.data.max_response_tokens} tokens"
        lines.append(line)
    lines.append("how long that takes, and the memory of every phase: gadcore plan, with the same settings")
    return "\n".join(lines)


def _prompts(steps: int, rows: int, batch_size: int) -> int:
    """Prompts of the first `steps` steps."""
    epochs, position = divmod(steps, -(-rows // batch_size))
    return epochs * rows + position * batch_size
