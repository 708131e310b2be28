"""Blocks of reasoning, <think> .. </think>: what of them teacher and student may have, by data.reasoning.

            teacher's text                what D and the measures see of a sample     what the student's loss covers
    keep    as it is                      all of it                                   every token
    strip   without its blocks            what is left without its blocks             every token that was drawn
    error   a block makes the row bad     a block ends the run                        every token

So under "strip" the student may reason, is paid for its answer alone, and learns from the tokens that led there; what
it is taught by cross-entropy is the teacher's answer without reasoning. A block that was never closed, as where a
sample was cut inside it, leaves no answer; what stands before a </think> that nothing opened is part of a block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from gadcore.data.groups import Group, Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError

Policy = Literal["keep", "strip", "error"]
OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(rf"{OPEN}.*?(?:{CLOSE}|\Z)", re.DOTALL)
_PROBE = "Hello"


def reasons(text: str) -> bool:
    """Whether a text has a block of reasoning, or a part of one."""
    return OPEN in text or CLOSE in text


def answer_of(text: str) -> str:
    """The text without its blocks of reasoning, and without the white space behind them."""
    if not reasons(text):
        return text
    opened, closed = text.find(OPEN), text.find(CLOSE)
    if closed >= 0 and (opened < 0 or closed < opened):
        text = text[closed + len(CLOSE) :]
    return _BLOCK.sub("", text).lstrip()


def of_teacher(text: str, policy: Policy) -> str:
    """The teacher's text under the policy. UserError, the rest of a sentence on the row, where it must not be so."""
    if policy == "keep" or not reasons(text):
        return text
    if policy == "error":
        raise UserError(
            f'the teacher\'s response has a block of reasoning ({OPEN}): take it out, or set data.reasoning to "strip" '
            'or "keep"'
        )
    answer = answer_of(text)
    if not answer.strip():
        raise UserError('the teacher\'s response is nothing but reasoning, which data.reasoning = "strip" takes off')
    return answer


def of_student(response: Response, policy: Policy, where: str) -> Response:
    """A sample as others see it under the policy; its tokens stay. where: its prompt, for the UserError of "error"."""
    if policy == "keep" or not reasons(response.text):
        return response
    if policy == "error":
        raise UserError(
            f'a sample of the student for {where} has a block of reasoning ({OPEN}), and data.reasoning = "error" ends '
            'the run there: close its blocks by data.template_arguments, or set data.reasoning to "strip" or "keep"'
        )
    return replace(response, text=answer_of(response.text))


def of_samples(groups: Sequence[Group], policy: Policy) -> None:
    """Puts of_student() of their samples into the groups."""
    for group in groups:
        where = f"the prompt of row {group.prompt.index} (from 0)"
        group.samples = [of_student(sample, policy, where) for sample in group.samples]


def header_of(template: ChatTemplate) -> Literal["open", "closed", "none"]:
    """Whether prompts end in a block of reasoning that is open, in one that is closed (mostly an empty one), or in
    none."""
    tail = template.rendered([{"role": "user", "content": _PROBE}]).rpartition(_PROBE)[2]
    opened, closed = tail.rfind(OPEN), tail.rfind(CLOSE)
    return "none" if opened < 0 and closed < 0 else "open" if opened > closed else "closed"


def check(policy: Policy, template: ChatTemplate, reasoned: int, rows: int) -> list[str]:
    """Notes on what the policy, the template and the rows make of each other, in sentences.

    reasoned: teacher's responses that have a block, of `rows`. Raises UserError where they contradict each other.
    """
    header = header_of(template)
    close = "close it by data.template_arguments (often enable_thinking = false)"
    if header == "open":
        if policy != "keep":
            raise UserError(
                f'prompts end in an open block of reasoning ({OPEN}), and data.reasoning = "{policy}" teaches '
                f"responses without one: the student would learn to answer inside it; {close}, or set data.reasoning "
                'to "keep"'
            )
        if reasoned < rows:
            raise UserError(
                f"prompts end in an open block of reasoning ({OPEN}), and {rows - reasoned} of {rows} teacher "
                f"responses never close one: the student would learn to answer inside it; {close}"
            )
    if policy != "keep":
        return []
    if header == "closed" and reasoned:
        raise UserError(
            f"prompts end in a closed block of reasoning ({CLOSE}), and {reasoned} of {rows} teacher responses hold "
            'one of their own: set data.reasoning to "strip", or choose by data.template_arguments prompts that end '
            "without one"
        )
    if 0 < reasoned < rows:
        return [
            f"{reasoned} of {rows} teacher responses hold a block of reasoning and the others none: the discriminator "
            'sees which, and the student is taught both; data.reasoning = "strip" takes it off'
        ]
    if not reasoned and header == "none" and OPEN in template.tokenizer.get_vocab():
        return [
            f"the student's tokenizer knows {OPEN} and no teacher response has it: where the student reasons, the "
            'discriminator tells it by that alone; data.reasoning = "strip" hides reasoning from it'
        ]
    return []
