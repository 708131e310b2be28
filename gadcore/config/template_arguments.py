"""The type of data.template_arguments: what chat templates are rendered with."""

from __future__ import annotations

import re
import tomllib
from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

# What a template has already: what it is rendered with, and words of its language.
_TAKEN = re.compile(
    "messages|conversation|tools|documents|chat_template|add_generation_prompt|continue_final_message|tokenize|padding|"
    "truncation|max_length|return_.*|tokenizer_kwargs|(bos|eos|unk|sep|pad|cls|mask)_token|strftime_now|raise_exception|"
    "loop|namespace|range|true|false|none|and|or|not|in|is|if|elif|else|for|set|self|gadcore_.*",
    re.IGNORECASE,
)


def _as_table(value: Any) -> Any:
    """A table from a command line's NAME=VALUE,NAME=VALUE: values as TOML writes them, or text."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"table = {{{value}}}")["table"]
    except ValueError:
        pairs = [item.partition("=") for item in value.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise ValueError(f"data.template_arguments must be a table or NAME=VALUE,NAME=VALUE, not {value!r}")
    return {name.strip(): _toml_or_text(text.strip()) for name, _, text in pairs}


def _toml_or_text(text: str) -> Any:
    for spelling in (text, text.lower()):  # True and False, as Python writes them
        try:
            table = tomllib.loads(f"value = {spelling}")
        except ValueError:
            continue
        if len(table) == 1:
            return table["value"]
    return text


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or _TAKEN.fullmatch(name):
            raise ValueError(
                f"data.template_arguments has {name!r}, which cannot be an argument of a chat template: use names that "
                "the template reads, for example enable_thinking"
            )
        if not _is_plain(value):
            raise ValueError(
                f"data.template_arguments has {name} = {value}: values are text, finite numbers, true, false, or lists "
                "and tables of those"
            )
    return arguments


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))


TemplateArguments = Annotated[dict[str, Any], BeforeValidator(_as_table), AfterValidator(_checked)]
