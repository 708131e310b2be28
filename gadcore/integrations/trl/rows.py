"""What TRL hands to a reward function, as groups of text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError

# A prompt of TRL: plain text, or a conversation.
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A sample: its prompt, the teacher's response to it, its own text without end marker, whether it ended by itself
    (False where a limit cut it)."""

    prompt: Prompt
    teacher: str
    text: str
    finished: bool


class SampleTexts:
    """Completion ids as text, by the student's tokenizer.

    Special tokens in the middle stay visible, as they do in gadcore's own runs: what TRL decodes leaves them out, and a
    student could hide from the discriminator in them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        """end_ids: whichever of them a completion ends in, it has ended by itself."""
        self.end_ids = frozenset(end_ids)
        self.tokenizer = tokenizer
        # A copy: gadcore may change the template's header, the trainer's tokenizer is not ours.
        self.template = ChatTemplate(copy.deepcopy(tokenizer)) if tokenizer.chat_template else None

    def __call__(self, ids: Sequence[int]) -> tuple[str, bool]:
        """(text, finished)."""
        finished = bool(ids) and ids[-1] in self.end_ids
        if self.template is not None:
            # Whatever marker ended it: text_of() knows the template's.
            shown = [*ids[:-1], self.template.end_id] if finished else list(ids)
            return self.template.text_of(shown)[0], finished
        shown = list(ids[:-1] if finished else ids)
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text), finished


def end_ids_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion for TRL: those of the model's generation config, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [own] if isinstance(own, int) else list(own or [])
    return [*ids, *([] if tokenizer.eos_token_id in ids else [tokenizer.eos_token_id])]


def rows_of(
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
    teacher_column: str,
    texts: SampleTexts,
) -> list[Row]:
    """A row for every completion. UserError for a column that is not there, and for what is no single text answer."""
    teachers = columns.get(teacher_column)
    if teachers is None:
        there = ", ".join(sorted(name for name, value in columns.items() if isinstance(value, list))) or "none"
        raise UserError(
            f"the data set has no column {teacher_column!r} with the teacher's text (other columns: {there}): name it "
            "with teacher_column="
        )
    rows = []
    for prompt, completion, ids, teacher in zip(prompts, completions, completion_ids, teachers, strict=True):
        if not isinstance(teacher, str) or not teacher:
            raise UserError(f"the column {teacher_column!r} must hold the teacher's text in every row, has {teacher!r}")
        if not isinstance(completion, str) and len(completion) != 1:
            raise UserError(
                f"a completion has {len(completion)} messages: the discriminator compares single responses, so tools "
                "and environments cannot be trained with GAD"
            )
        rows.append(Row(_text_alone(prompt), teacher, *texts(ids)))
    return rows


def _text_alone(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    for message in prompt:
        if not isinstance(message.get("content"), str):
            raise UserError(f"a prompt has a message whose content is no text: {message!r:.200}")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def groups_of(rows: Sequence[Row], samples: int | None = None) -> list[list[Row]]:
    """Rows that stand beside each other by prompt: `samples` each, or however many stand together.

    UserError where rows of one group differ in prompt or teacher.
    """
    if samples is None:
        groups: list[list[Row]] = []
        for row in rows:
            if not groups or _key(groups[-1][0]) != _key(row):
                groups.append([])
            groups[-1].append(row)
        return groups
    if len(rows) % samples:
        raise UserError(f"{len(rows)} samples are no whole groups of num_generations = {samples}")
    groups = [list(rows[i : i + samples]) for i in range(0, len(rows), samples)]
    for group in groups:
        if any(_key(row) != _key(group[0]) for row in group):
            raise UserError(
                f"{samples} samples that stand together are not of one prompt and teacher's response: GADReward needs "
                "TRL's own sampler, which repeats every prompt num_generations times"
            )
    return groups


def _key(row: Row) -> tuple[Prompt, str]:
    return row.prompt, row.teacher
