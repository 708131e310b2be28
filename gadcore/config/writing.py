"""Settings as TOML, and as the text of --help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from gadcore.config.kinds import Section
from gadcore.text import short


def to_toml(value: Any) -> str:
    """A value as TOML writes it; None as "none"."""
    if isinstance(value, Section):
        value = value.model_dump()
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON strings are TOML strings but for the one control character that only TOML escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{to_toml(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    # Python writes no integer of more than 4300 digits; one in hexadecimal may have them.
    return hex(value) if isinstance(value, int) and value.bit_length() > 1000 else str(value)


def shown(value: Any) -> str:
    """A value for a message: as TOML, in a bounded length."""
    return short(to_toml(value), 100)


def print_help(config: Section, program: str, introduction: str) -> None:
    """Prints the call of `program`, the introduction, and every setting with its type, value in `config` and use."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()
    metavars: dict[Any, str] = {dict: "TABLE", tuple: "LIST", Literal: "NAME", None: "{true,false}"}

    @registry.primitive_rule
    def _as_toml(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        # A choice of one word is that between classes of settings; others may be named, which change what is shown.
        one_word = get_origin(info.type) is Literal and len(get_args(info.type)) == 1
        if info.type is not bool and get_origin(info.type) not in (dict, tuple) and not one_word:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavars[get_origin(info.type)],
            instance_from_str=lambda texts: texts[0],
            is_instance=lambda value: True,
            str_from_instance=lambda value: [value if isinstance(value, str) else to_toml(value)],
        )

    tyro.cli(
        type(config),
        args=["--help"],
        default=config,
        prog=program,
        description=f"{introduction}\n\nBelow: every setting, with the value it would have.",
        use_underscores=True,
        registry=registry,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
