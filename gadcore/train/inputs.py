"""What is known of a run before a model is loaded: its rows, through the chat templates of its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gadcore.config.device import device_of, quiet
from gadcore.config.effects import without_effect
from gadcore.config.settings import Config
from gadcore.data.batches import Loader, build_prompts
from gadcore.data.groups import Group
from gadcore.data.rows import load_rows
from gadcore.errors import UserError
from gadcore.models.spec import ModelSpec
from gadcore.train.progress import stage_steps


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before a model is loaded.

    discriminator: None in a run that trains none. notes: what happened to rows on the way, in sentences.
    """

    student: ModelSpec
    discriminator: ModelSpec | None
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
    device = device_of(config)
    student = ModelSpec.resolve(
        config.student.model, system_prompt=data.system_prompt, arguments=data.template_arguments
    )
    if unused := student.template.unused_arguments():
        raise UserError(
            f"data.template_arguments has {', '.join(unused)}, which the template of {student.path} does not read: "
            "leave it out, or look for its name in that template"
        )
    discriminator = _discriminator_spec(config, student) if has_discriminator(stages) else None
    limit = student.context_tokens
    if limit and config.context_tokens > limit:
        raise UserError(
            f"prompt and response limits need a context of {config.context_tokens} tokens, the model {student.path} "
            f"has {limit}: lower data.max_prompt_tokens or data.max_response_tokens"
        )
    train, report = build_prompts(train_rows, student.template, data)
    loader = Loader(train, config.schedule.batch_size, config.run.seed)
    notes = without_effect(config, device.type, stages, loader.steps_per_epoch)
    notes += student.notes()
    if discriminator is not None and discriminator is not student:
        notes += discriminator.template.notes
    notes += [f"training: {sentence}" for sentence in report.sentences()]
    held_out: list[Group] = []
    if eval_rows:
        held_out, report = build_prompts(eval_rows, student.template, data)
        notes += [f"held out: {sentence}" for sentence in report.sentences()]
    if discriminator is not None:
        if config.convergence.enabled and len(held_out) < 4:
            raise UserError(
                f"convergence.enabled needs 4 held-out rows or more, there are {len(held_out)}: give more by data.eval "
                "and data.eval_rows, or switch it off"
            )
        notes += _few_held_out(config, len(held_out))
        if discriminator is not student:
            _check_context(config, discriminator, student, [*train, *held_out])
    return Inputs(student, discriminator, train, held_out, notes)


def has_discriminator(stages: Sequence[str]) -> bool:
    """Whether a run of these stages trains a discriminator: all but the baseline do."""
    return tuple(stages) != ("seqkd",)


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
        f"student {config.student.model} ({inputs.student.path})",
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
