"""Takes a command line apart into a file or preset and overrides of settings.

By hand; tyro writes --help. tyro.cli over a config has its own spelling of values (`--data.eval none` would be a file
named none, false and [0.9, 0.999] are refused), ends the process with a box at the first error, and wants a config that
is valid before the command line mends it. It gives back a config without saying what was set. A TypedDict in place of
the config would say that, but then tyro only cuts --key=VALUE at the equals sign: values, and whatever is wrong with
them, would still be read here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gadcore.config.kinds import Section
from gadcore.errors import UserError
from gadcore.text import short

COMMAND_LINE = "command line"
HELP = ("-h", "--help")


def kinds_of(annotation: Any) -> list[Any]:
    """The types that an annotation admits: `Annotated[int, ..] | None` gives [int, NoneType]."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for argument in get_args(annotation) for kind in kinds_of(argument)]
    if origin is Literal:
        return [type(argument) for argument in get_args(annotation)]
    return [origin or annotation]


def setting_kinds(model: type[Section]) -> dict[str, list[Any]]:
    """{"section.key": the types that it admits}, of every alternative of a section."""
    kinds: dict[str, list[Any]] = {}
    for section, field in model.model_fields.items():
        for alternative in kinds_of(field.annotation):
            for name, setting in alternative.model_fields.items():
                kinds.setdefault(f"{section}.{name}", []).extend(kinds_of(setting.annotation))
    return kinds


def split(argv: Sequence[str], kinds: Mapping[str, list[Any]]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """([("config" or "preset", its value), ..], {"section.key": value}) of a command line; the last value counts.

    kinds: as setting_kinds gives them. HELP is left out. Raises UserError for what is no --key VALUE or --key=VALUE.
    """
    bases: list[tuple[str, str]] = []
    overrides: dict[str, Any] = {}
    sections = {key.partition(".")[0] for key in kinds}
    items = (item for item in argv if item not in HELP)
    for item in items:
        if not item.startswith("--"):
            raise UserError(f"unexpected argument {short(item)!r}: settings are written --section.key VALUE")
        key, equals, value = item[2:].partition("=")
        if not equals:
            value = next(items, "--")
            if value.startswith("--"):
                raise UserError(f"--{key} needs a value: --{key} VALUE")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"the value of --{key} is not UTF-8: {value.encode(errors='surrogateescape')!r}")
        if key in ("config", "preset"):
            bases.append((key, value))
            continue
        key = key.replace("-", "_")
        if key in sections:
            raise UserError(f"{key} ({COMMAND_LINE}) is a group of settings: write --{key}.NAME VALUE")
        parsed = _parse(value, kinds.get(key, [str]))
        if dict in kinds.get(key, ()) and isinstance(parsed, str) and isinstance(overrides.get(key), str):
            parsed = f"{overrides[key]},{parsed}"  # a=b given twice: both
        overrides[key] = parsed
    if len(bases) > 1:
        raise UserError(
            f"{' and '.join(f'--{name} {value}' for name, value in bases)} are given together: "
            "start from one file or one preset"
        )
    return bases, overrides


def _parse(text: str, kinds: Sequence[Any]) -> Any:
    """A value from the command line; text that is none of the setting's type is left for the validation to refuse."""
    if (str in kinds and not {int, float}.intersection(kinds)) or text.lower() == "none":
        return text
    for spelling in (text, text.lower()):  # True and False, as Python writes them
        try:
            table = tomllib.loads(f"value = {spelling}")
        except (ValueError, RecursionError):  # an integer of more digits than Python reads, deep nesting
            continue
        if len(table) == 1:
            return table["value"]
    try:
        return float(text) if float in kinds else text  # .5 and 1., which TOML refuses
    except ValueError:
        return text
