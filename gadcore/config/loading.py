"""Settings come from a preset or a TOML file, and from the command line.

    --config FILE.toml | --preset NAME      default: --preset smollm2-cpu
    --section.key VALUE, --section.key=VALUE

A later value replaces an earlier one: defaults, then the file, then the command line from left to right. Values on the
command line are written as in TOML, except that text needs no quotes. TOML has no null, so `none` unsets a setting that
may be unset (data.eval, run.resume, ..), in a file as "none" and on the command line as none.

Commands with settings of their own (collect, eval) pass their model of sections; presets are for training runs only, so
these start from the model's defaults.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, overload

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rapidfuzz import fuzz, process

from gadcore.config.renamed import refuse_old_names
from gadcore.config.settings import Config, Section
from gadcore.errors import UserError

Root = TypeVar("Root", bound=Section)

DEFAULT_PRESET = "smollm2-cpu"
COMMAND_LINE = "command line"
_PRESETS = Path(__file__).parents[1] / "configs"
_SENTENCES = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": 'must be a table, for example {prompt = "question"}',
    "tuple_type": "must be a list, for example [0.9, 0.999]",
    "missing": "has too few items",
    "too_long": "has too many items",
}


def presets() -> list[str]:
    """Names that `--preset` accepts, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


@overload
def load(argv: Sequence[str]) -> Config: ...
@overload
def load(argv: Sequence[str], model: type[Root]) -> Root: ...
def load(argv: Sequence[str], model: type[Section] = Config) -> Section:
    """The settings of a command line (without program and sub-command).

    model: a Section whose fields are Sections of plain settings; its `title` is the command's name.

    `--help` prints every setting with its value and raises SystemExit(0). Raises UserError for an unknown setting, a
    wrong type or value, a combination that cannot work, a missing or broken file.
    """
    kinds = _setting_kinds(model)
    wants_help = any(item in ("-h", "--help") for item in argv)
    base, overrides = _split([item for item in argv if item not in ("-h", "--help")], model)
    origin, table = _read(*base) if base else (COMMAND_LINE, {})
    values = _flatten(table, origin, model)
    origins = dict.fromkeys(values, origin)
    values.update(overrides)
    origins.update(dict.fromkeys(overrides, COMMAND_LINE))
    refuse_old_names(values, origins)

    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"unknown setting {key} ({origins[key]}){_suggest(key, kinds)}")
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = _settle(value, kinds[key])
    try:
        # Strict, or `batch_size = true` would count as 1 and a number in quotes as a number.
        config = model.model_validate(nested, strict=True)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], values, origins)) from None
    if wants_help:
        _print_help(config)
        raise SystemExit(0)
    return config


def dump(config: Section) -> str:
    """The fully resolved settings as TOML that `load(["--config", FILE], type(config))` reads back to equal ones."""
    blocks = []
    for section in type(config).model_fields:
        settings = getattr(config, section)
        lines = [f"{name} = {_toml(getattr(settings, name))}" for name in type(settings).model_fields]
        blocks.append("\n".join([f"[{section}]", *lines]) + "\n")
    return "\n".join(blocks)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be; None where nothing is close."""
    found = process.extractOne(word, sorted(choices), scorer=fuzz.WRatio, score_cutoff=60)
    return str(found[0]) if found else None


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation admits: `Annotated[int, ..] | None` gives {int, NoneType}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*(_kinds(arg) for arg in get_args(annotation)))
    if origin is Literal:
        return {type(arg) for arg in get_args(annotation)}
    return {origin or annotation}


@cache
def _setting_kinds(model: type[Section]) -> dict[str, set[Any]]:
    """{"section.key": the types that it admits}."""
    return {
        f"{section}.{name}": _kinds(setting.annotation)
        for section, field in model.model_fields.items()
        if field.annotation is not None
        for name, setting in field.annotation.model_fields.items()
    }


def _split(argv: Sequence[str], model: type[Section]) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """Takes a command line apart: (("config" or "preset", its value) or None, {"section.key": value})."""
    bases: list[tuple[str, str]] = []
    overrides: dict[str, Any] = {}
    items = iter(argv)
    for item in items:
        if not item.startswith("--"):
            raise UserError(f"unexpected argument {item!r}: settings are written --section.key VALUE")
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
        if key in model.model_fields:
            raise UserError(f"{key} ({COMMAND_LINE}) is a group of settings: write --{key}.NAME VALUE")
        overrides[key] = _parse(value, _setting_kinds(model).get(key, {str}))
    if len(bases) > 1:
        raise UserError(
            f"{' and '.join(f'--{name} {value}' for name, value in bases)} are given together: "
            "start from one file or one preset"
        )
    if model is Config:
        return bases[0] if bases else ("preset", DEFAULT_PRESET), overrides
    if bases and bases[0][0] == "preset":
        raise UserError(f"--preset {bases[0][1]} is for training runs: give this command's settings by --config FILE")
    return bases[0] if bases else None, overrides


def _parse(text: str, kinds: set[Any]) -> Any:
    """A value from the command line; text that is none of the setting's type is left for the validation to refuse."""
    if str in kinds or text.lower() == "none":
        return text
    for spelling in (text, text.lower()):  # True and False, as Python writes them
        try:
            table = tomllib.loads(f"value = {spelling}")
        except tomllib.TOMLDecodeError:
            continue
        if len(table) == 1:
            return table["value"]
    try:
        return float(text) if float in kinds else text  # .5 and 1., which TOML refuses
    except ValueError:
        return text


def _settle(value: Any, kinds: set[Any]) -> Any:
    if NoneType in kinds and isinstance(value, str) and value.lower() == "none":
        return None
    return tuple(value) if tuple in kinds and isinstance(value, list) else value


def _read(kind: str, name: str) -> tuple[str, dict[str, Any]]:
    """The TOML table of a file or preset, and the words that say where its values come from."""
    if kind == "preset":
        if name not in presets():
            hint = _suggest(name, presets()) or f": choose one of {', '.join(presets())}"
            raise UserError(f"there is no preset {name}{hint}")
        path, origin = _PRESETS / f"{name}.toml", f"preset {name}"
    else:
        path, origin = Path(name), name
    try:
        return origin, tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        hint = f"; for the preset of this name write --preset {name}" if name in presets() else ""
        raise UserError(f"the config file {name} does not exist{hint}") from None
    except OSError as error:
        raise UserError(f"the config file {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from None


def _flatten(table: Mapping[str, Any], origin: str, model: type[Section]) -> dict[str, Any]:
    """{"section": {"key": value}} as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for section, content in table.items():
        if isinstance(content, dict) and (content or section in model.model_fields):
            flat.update({f"{section}.{name}": value for name, value in content.items()})
        elif section in model.model_fields:
            raise UserError(f"{section} ({origin}) is a group of settings: write it as a table [{section}]")
        else:
            flat[section] = content
    return flat


def _suggest(word: str, choices: Iterable[str]) -> str:
    choice = nearest(word, choices)
    return f"; did you mean {choice}?" if choice else ""


def _sentence(error: ErrorDetails, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """One sentence for one validation error."""
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        named = [f"{key}: {origin}" for key, origin in origins.items() if re.search(rf"{re.escape(key)}\b", message)]
        return f"{message} ({', '.join(named)})" if named else message
    key = ".".join(str(part) for part in error["loc"][:2])
    inside = "".join(f"[{_toml(part)}]" for part in error["loc"][2:] if error["type"] != "missing")
    inside = f": item {inside}" if inside else ""
    rule = _SENTENCES.get(error["type"], error["msg"].replace("Input should be", "must be"))
    return f"{key} = {_toml(values[key])} ({origins[key]}){inside} {rule}"


def _toml(value: Any) -> str:
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
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value)


def _print_help(config: Section) -> None:
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()
    metavars: dict[Any, str] = {dict: "TABLE", tuple: "LIST", None: "{true,false}"}

    @registry.primitive_rule
    def _as_toml(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type is not bool and get_origin(info.type) not in (dict, tuple):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavars[get_origin(info.type)],
            instance_from_str=lambda texts: texts[0],
            is_instance=lambda value: True,
            str_from_instance=lambda value: [_toml(value)],
        )

    named = f"Presets: {', '.join(presets())}." if isinstance(config, Config) else config.__doc__
    tyro.cli(
        type(config),
        args=["--help"],
        default=config,
        prog=f"python -m gadcore.run {config.model_config.get('title') or ''}".rstrip(),
        description=f"{__doc__}\n{named}\nBelow: every setting, with the value it would have.",
        use_underscores=True,
        registry=registry,
        config=(tyro.conf.FlagConversionOff,),
    )
