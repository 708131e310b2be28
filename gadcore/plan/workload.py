"""How much work a step and a run are: rows, steps, and mean tokens of prompts and responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gadcore.config.data import SPLIT
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.plan.assumptions import Assumption
from gadcore.plan.settings import PlanSettings
from gadcore.train.progress import stage_steps, stages_of

if TYPE_CHECKING:
    from gadcore.data.groups import Group

# Rows of a set that is not read here, mean tokens of its prompts and responses.
_KNOWN = {
    "ytz20/LMSYS-Chat-GPT-5-Chat-Response": (
        192_014,
        110.0,
        320.0,
        "card of a copy of the set: 192,014 rows of 1,908 bytes; assumed: 4.4 bytes a token, a quarter the prompt's",
    )
}


@dataclass(frozen=True)
class Workload:
    """A step: `prompts` prompts with `samples` samples and one teacher response each. Lengths are means, in tokens.

    steps: of every stage. eval_rows: held-out prompts. limit: tokens of a response at most, longest_prompt: of a
    prompt.
    """

    prompts: int
    samples: int
    prompt: float
    response: float
    teacher: float
    limit: int
    longest_prompt: int
    steps: dict[str, int]
    eval_rows: int

    @property
    def sampled(self) -> float:
        """Tokens that a step samples."""
        return self.prompts * self.samples * self.response

    @property
    def student_tokens(self) -> float:
        """Packed tokens of a step's policy pass; a response's last token predicts nothing and is left out."""
        return self.prompts * (self.prompt + self.samples * (self.response - 1))

    @property
    def student_pairs(self) -> float:
        return self.prompts * pairs_of(self.prompt, [self.response] * self.samples)

    @property
    def discriminator_tokens(self) -> float:
        """Packed tokens of a step's discriminator pass."""
        return self.prompts * (self.prompt + self.teacher + self.samples * self.response)

    @property
    def discriminator_pairs(self) -> float:
        return self.prompts * pairs_of(self.prompt, [self.teacher] + [self.response] * self.samples)

    @property
    def warmup_tokens(self) -> float:
        """Packed tokens of a warmup step's cross-entropy."""
        return self.prompts * (self.prompt + self.teacher - 1)

    @property
    def warmup_pairs(self) -> float:
        return self.prompts * pairs_of(self.prompt, [self.teacher])

    def responses_among(self, tokens: float) -> float:
        """Response tokens among `tokens` packed tokens of the policy pass."""
        return tokens * self.samples * self.response / (self.prompt + self.samples * self.response)


def pairs_of(prompt: float, responses: list[float]) -> float:
    """(query, key) pairs of a prompt and its responses, by their lengths."""
    return prompt * prompt / 2 + sum(r * prompt + r * r / 2 for r in responses)


@dataclass(frozen=True)
class Counted:
    """Training rows, and their mean tokens; why: where that was counted."""

    rows: int
    prompt: float
    teacher: float
    why: str

    @classmethod
    def of(cls, groups: Sequence[Group], config: Config) -> Counted:
        """Of the rows that a run trains on, one at least."""
        # Imported only here: most plans read no data.
        from gadcore.data.encoded import token_lengths

        prompt, teacher = (int(lengths.sum()) / len(groups) for lengths in token_lengths(groups))
        return cls(len(groups), prompt, teacher, f"counted in data.train = {config.data.train}")


def read_workload(
    config: Config, plan: PlanSettings, counted: Counted | None = None, stages: Sequence[str] | None = None
) -> tuple[Workload, list[Assumption]]:
    """The work of a run, and where its figures come from.

    stages: by name; default those of the command `train`. counted: where the data has been read already. Else it is
    read here where it comes with gadcore or is a file, and the tokenizer is at hand.
    Raises UserError for broken data, or where neither plan.rows nor the data says how many rows there are.
    """
    data = config.data
    known = counted or _from_data(config) or _assumed(config, plan)
    rows, prompt, why = known.rows, known.prompt, known.why
    teacher = plan.teacher_tokens or known.teacher
    sampled = plan.response_tokens or teacher
    items = [
        Assumption("rows", plan.rows or rows, "rows", "plan.rows" if plan.rows else why),
        Assumption(
            "prompt_tokens", plan.prompt_tokens or prompt, "tokens", "plan.prompt_tokens" if plan.prompt_tokens else why
        ),
        Assumption("teacher_tokens", teacher, "tokens", "plan.teacher_tokens" if plan.teacher_tokens else why),
        Assumption(
            "response_tokens",
            sampled,
            "tokens",
            "plan.response_tokens" if plan.response_tokens else "assumed: samples as long as the teacher's responses",
        ),
    ]
    for item, limit in zip(items[1:], (data.max_prompt_tokens, *[data.max_response_tokens] * 2), strict=True):
        if item.value > limit:
            raise UserError(
                f"plan.{item.name} = {item.value:g} is a mean above the limit of {limit} tokens in data: lower it"
            )
    count = int(items[0].value)
    per_epoch = math.ceil(count / config.schedule.batch_size)
    work = Workload(
        prompts=min(config.schedule.batch_size, count),
        samples=config.rollout.group_size,
        prompt=items[1].value,
        teacher=items[2].value,
        response=items[3].value,
        limit=data.max_response_tokens,
        longest_prompt=data.max_prompt_tokens,
        steps=stage_steps(config, stages or stages_of(config, "train"), per_epoch),
        eval_rows=(data.eval_rows or 500) if data.eval else 0,
    )
    why = "data.eval_rows" if data.eval_rows else "assumed: data.eval_rows is not set"
    items.append(Assumption("eval_rows", work.eval_rows, "rows", why if data.eval else "no held-out rows"))
    return work, items


def _from_data(config: Config) -> Counted | None:
    data = config.data
    if data.train != "builtin" and not Path(data.train).expanduser().exists():
        return None
    # Imported only here: most plans read no data.
    from gadcore.data.encoded import Rows, split_off
    from gadcore.data.sources import Source
    from gadcore.models.loading import BUNDLED, cache_dir
    from gadcore.models.spec import ModelSpec

    rows = Rows(Source.find(data.train, "train"), data, data.train_rows)
    rows.check()
    name = config.student.model
    at_hand = name in BUNDLED or (Path(name).expanduser() / "tokenizer_config.json").is_file()
    if not at_hand:
        return None
    spec = ModelSpec.resolve(name, system_prompt=data.system_prompt, arguments=data.template_arguments)
    groups, _, _ = rows.groups(spec.template, cache_dir(), print)
    if data.eval == SPLIT:
        groups, _ = split_off(groups, data.eval_share, data.eval_rows, config.run.seed)
    return Counted.of(groups, config)


def _assumed(config: Config, plan: PlanSettings) -> Counted:
    data = config.data
    if data.train in _KNOWN:
        rows, prompt, response, why = _KNOWN[data.train]
        return Counted(
            min(rows, data.train_rows or rows),
            min(prompt, data.max_prompt_tokens),
            min(response, data.max_response_tokens),
            why,
        )
    if plan.rows is None and data.train_rows is None:
        raise UserError(
            f"data.train = {data.train} cannot be counted here: give plan.rows (and plan.prompt_tokens, "
            "plan.teacher_tokens)"
        )
    # Conversations are mostly far shorter than their limits.
    why = "assumed: a quarter of the limit"
    return Counted(plan.rows or data.train_rows or 1, data.max_prompt_tokens / 4, data.max_response_tokens / 4, why)


def at_lengths(work: Workload, *, prompt: float, response: float, teacher: float, prompts: int) -> Workload:
    """The same work with the lengths that a step really had."""
    return replace(work, prompt=prompt, response=response, teacher=teacher, prompts=prompts)
