"""A chat template as a tokenizer renders it: with arguments, within a time limit, errors as sentences."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from gadcore.data.limits import TooLarge, TooLong, limited, tried
from gadcore.errors import UserError, foreign

Message = Mapping[str, str]

# Some templates (Llama 3.2) write today's date into the prompt. Runs must not depend on the day, so every template
# sees the day that Llama 3's templates use when they know no clock.
_DAY = datetime.datetime(2024, 7, 26)
# Of one conversation. Templates take milliseconds, and write some thousand characters of their own.
_SECONDS = 10.0
_MEMORY = 512 << 20
_CHARACTERS = 1_000_000


def try_template(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> None:
    """Renders short conversations where that does no harm. UserError where it takes too long or too much memory.

    A template is a program of whoever made the model, and one operation of it cannot be stopped in this process.
    """

    def render_all() -> None:
        for messages in conversations:
            for header in (True, False):
                try:
                    _apply(tokenizer, messages, header)
                except MemoryError:
                    raise
                except Exception:  # told where it is rendered in earnest
                    continue

    try:
        tried(render_all, seconds=_SECONDS, memory=_MEMORY)
    except TooLong:
        raise _too_long(tokenizer) from None
    except TooLarge:
        raise UserError(
            f"the chat template of {name_of(tokenizer)} takes more than {_MEMORY >> 20} MiB of memory for a "
            "conversation of two lines: mend what it repeats or builds up there"
        ) from None


def render(tokenizer: Any, messages: Sequence[Message], *, header: bool) -> str:
    """A conversation as text. header: with the header of an assistant's turn behind it.

    Raises UserError for whatever the template raises, and where it takes longer than a few seconds or makes a text that
    no conversation is.
    """
    name = name_of(tokenizer)
    try:
        with foreign(f"the chat template of {name} fails on the conversation"), limited(_SECONDS):
            text = str(_apply(tokenizer, messages, header))
    except UserError as error:
        if isinstance(error.__cause__, TemplateError):
            raise UserError(f"the chat template of {name} refuses the conversation: {error.__cause__}") from None
        if isinstance(error.__cause__, TooLong):
            raise _too_long(tokenizer) from None
        raise
    said = sum(len(message["content"]) for message in messages)
    if len(text) > _CHARACTERS + 100 * said:
        raise UserError(
            f"the chat template of {name} makes {len(text)} characters of a conversation that has {said}: mend what it "
            "repeats"
        )
    return text


def _apply(tokenizer: Any, messages: Sequence[Message], header: bool) -> Any:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=header, tokenize=False, strftime_now=_DAY.strftime
    )


def _too_long(tokenizer: Any) -> UserError:
    return UserError(
        f"the chat template of {name_of(tokenizer)} was not done with a conversation after {_SECONDS:g} s: mend its "
        "loops"
    )


def name_of(tokenizer: Any) -> str:
    """What a tokenizer is called in errors."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def set_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Makes `arguments` what the tokenizer's chat template takes them for where nobody gives others.

    In the template itself, so that they are saved with it and whoever serves the model renders as it was trained. The
    line break is the one that transformers' environment takes away behind a block.
    """
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in arguments.items()
    )
    if defaults:
        _change(tokenizer, lambda source: source if source.startswith(defaults) else f"{defaults}\n{source}")


def unused_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Those whose names stand nowhere in the tokenizer's chat template, once set_arguments() has put them there."""
    templates = tokenizer.chat_template
    text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
    own = text.partition("\n")[2]
    return [name for name in arguments if not re.search(rf"\b{name}\b", own)]


def set_header(tokenizer: Any, wrong: str, right: str) -> None:
    """Makes the header of an assistant's turn end in `right` where it ended in `wrong`, as a part of the template too.

    The whole is rendered first: a template that ends in `right` by an argument of whoever serves it stays as it is.
    """
    cut = f"[:-{len(wrong)}]" if wrong else ""
    unless = f" and not gadcore_text.endswith({right!r})" if right else ""

    def change(source: str) -> str:
        # jinja takes one line break away at the end of a template.
        body = source.removesuffix("\n")
        return (
            f"{{% set gadcore_text %}}\n{body}{{%+ endset %}}"
            f"{{% if add_generation_prompt and gadcore_text.endswith({wrong!r}){unless} %}}"
            f"{{{{ gadcore_text{cut} + {right!r} }}}}"
            "{% else %}{{ gadcore_text }}{% endif %}"
        )

    _change(tokenizer, change)


def _change(tokenizer: Any, change: Any) -> None:
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: change(source) for name, source in templates.items()}
    elif isinstance(templates, str):
        tokenizer.chat_template = change(templates)


def difference(prompt: str, turn: str) -> tuple[str, str]:
    """(how `prompt` goes on, how `turn` goes on) behind what both begin with."""
    common = len(commonprefix([prompt, turn]))
    return prompt[common:], turn[common:]
