"""Settings come from a preset or a TOML file, and from the command line.

A later value replaces an earlier one: defaults, then the file, then the command line from left to right. Held-out rows
of a preset belong to its training rows: whoever names others, and no data.eval, gets data.eval = "split". Where the
command line, or a file over its base, chooses another engine, settings that only the former engine has are left behind.

Commands with settings of their own (collect, eval) pass their model of sections; presets are for training runs only, so
these start from the model's defaults.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, overload

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rapidfuzz import fuzz, process

from gadcore.config.command_line import COMMAND_LINE, HELP, kinds_of, setting_kinds, split
from gadcore.config.kinds import Section
from gadcore.config.renamed import refuse_old_names
from gadcore.config.rollout import OWN, kind_of_engine
from gadcore.config.settings import Config
from gadcore.config.writing import print_help, shown, to_toml
from gadcore.errors import UserError
from gadcore.text import short

Root = TypeVar("Root", bound=Section)

TRAINING = ("train", "seqkd", "soda")
DEFAULT_PRESET = "smollm2-cpu"
_PRESETS = Path(__file__).parents[1] / "configs"
# What --help says above the settings.
_VALUES = """\
Values are written as in TOML, but text needs no quotes; none unsets a setting that may be unset. Of a setting that is
given twice the last value counts; the command line counts more than a file."""
_BASES = """\
    --preset NAME             settings to start from; default smollm2-gpu where there is a GPU, else smollm2-cpu
    --config FILE.toml        or a file of yours, which may begin with base = "NAME", a preset that it changes
    --SECTION.KEY VALUE       a setting of those below, on top of either; also --SECTION.KEY=VALUE"""
_STARTS = """
    --dry-run                 what would run, and the memory and disk that it is predicted to take
    --resume auto             go on with the newest run, or that of --run.dir; --resume step-000003 goes back"""
_OWN_ROWS = """\
Training rows of your own bring their own held-out ones: a share of them is kept apart (data.eval_share) where data.eval
names none."""
_OF_COMMANDS = f"""\
    --config FILE.toml        settings from a file
    --SECTION.KEY VALUE       a setting of those below, on top of it; also --SECTION.KEY=VALUE

{_VALUES}"""
# Begins the origin of a preset's settings.
_PRESET = "preset "
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


@dataclass(frozen=True)
class Layer:
    """{"section.key": value} from one place. chosen: the user wrote them for this run himself."""

    origin: str
    values: Mapping[str, Any]
    chosen: bool = True


def presets() -> list[str]:
    """Names that `--preset` accepts, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


@overload
def load(
    argv: Sequence[str], *, saved: Path | None = None, default: str = DEFAULT_PRESET, command: str = "train"
) -> Config: ...
@overload
def load(argv: Sequence[str], model: type[Root]) -> Root: ...
def load(
    argv: Sequence[str],
    model: type[Section] = Config,
    *,
    saved: Path | None = None,
    default: str = DEFAULT_PRESET,
    command: str = "train",
) -> Section:
    """The settings of a command line (without program and sub-command).

    model: a Section whose fields are Sections of plain settings, or unions of such by their `engine`; its `title` is
    the command's name. saved: the config.toml of a run, to start from where argv names no file and no preset; default:
    the preset to start from where neither says so. command: of those that take a training run's settings, for --help.
    In the result, model_fields_set of a section are the settings that stand in the user's file or on the command line.

    `--help` prints every setting with its value and raises SystemExit(0). Raises UserError for an unknown setting, a
    wrong type or value, a combination that cannot work, a missing or broken file.
    """
    kinds = setting_kinds(model)
    bases, overrides = split(argv, kinds)
    layers = [*_base_layers(bases, model, saved, default), Layer(COMMAND_LINE, overrides)]
    values, origins = _merge(layers, kinds, model)
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        _check_texts(key, value, origins[key])
        nested.setdefault(section, {})[name] = _settle(value, kinds[key])
    try:
        # Strict, or `batch_size = true` would count as 1 and a number in quotes as a number.
        config = model.model_validate(nested, strict=True)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], values, origins)) from None
    if any(item in HELP for item in argv):
        _help(config, command)
    chosen = {key for layer in layers if layer.chosen for key in layer.values}
    for section in model.model_fields:
        settings: Section = getattr(config, section)
        settings.model_fields_set.intersection_update(
            [n for n in settings.model_fields_set if f"{section}.{n}" in chosen]
        )
    return config


def _help(config: Section, command: str) -> NoReturn:
    """--help of a command: its name and what it is for, how settings are given, every one of them."""
    if isinstance(config, Config):
        starts = _STARTS if command in TRAINING else ""
        about = f"{_BASES}{starts}\n\n{_VALUES} {_OWN_ROWS}\n\nPresets: {', '.join(presets())}."
    else:
        command = str(config.model_config.get("title", command))
        about = f"{config.__doc__}\n\n{_OF_COMMANDS}"
    print_help(config, f"gadcore {command}", about)
    raise SystemExit(0)


def dump(config: Section) -> str:
    """The fully resolved settings as TOML that `load(["--config", FILE], type(config))` reads back to equal ones."""
    blocks = []
    for section in type(config).model_fields:
        settings = getattr(config, section)
        lines = [f"{name} = {to_toml(getattr(settings, name))}" for name in type(settings).model_fields]
        blocks.append("\n".join([f"[{section}]", *lines]) + "\n")
    return "\n".join(blocks)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be; None where nothing is close."""
    found = process.extractOne(word, sorted(choices), scorer=fuzz.WRatio, score_cutoff=60)
    return str(found[0]) if found else None


def _base_layers(
    bases: Sequence[tuple[str, str]], model: type[Section], saved: Path | None, default: str
) -> list[Layer]:
    """What the command line builds on, the least first."""
    if model is Config:
        if saved and not bases:
            return _read(saved, str(saved), model, chosen=False)
        kind, name = bases[0] if bases else ("preset", default)
        if kind == "preset":
            return [*_read_preset(name, model), *_without_vllm()]
        return _read(Path(name).expanduser(), name, model)
    if bases and bases[0][0] == "preset":
        raise UserError(f"--preset {bases[0][1]} is for training runs: give this command's settings by --config FILE")
    return _read(Path(bases[0][1]).expanduser(), bases[0][1], model) if bases else []


def _without_vllm() -> list[Layer]:
    """A preset's engine where there is no vLLM to install: it has wheels for Linux on x86-64 and arm64 alone."""
    has_wheel = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    if has_wheel or importlib.util.find_spec("vllm") is not None:
        return []
    return [Layer("this machine, for which there is no vLLM", {"rollout.engine": "hf"}, chosen=False)]


def _read_preset(name: str, model: type[Section]) -> list[Layer]:
    if name not in presets():
        hint = _suggest(name, presets()) or f": choose one of {', '.join(presets())}"
        raise UserError(f"there is no preset {short(name)}{hint}")
    return _read(_PRESETS / f"{name}.toml", _PRESET + name, model, chosen=False)


def _read(path: Path, origin: str, model: type[Section], *, chosen: bool = True) -> list[Layer]:
    """The layers of a file: of the preset that it names as its base, and its own."""
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        hint = f"; for the preset of this name write --preset {origin}" if origin in presets() else ""
        raise UserError(f"the config file {short(origin)} does not exist{hint}") from None
    except OSError as error:
        raise UserError(f"the config file {short(origin)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{origin} holds a value that is nested too deeply: settings are lists and tables") from None
    except ValueError as error:  # TOMLDecodeError, and an integer of more digits than Python reads
        raise UserError(f"{origin} is not valid TOML: {error}") from None
    below: list[Layer] = []
    if model is Config and "base" in table:
        base = table.pop("base")
        if not isinstance(base, str):
            raise UserError(f"base = {shown(base)} ({origin}) must be the name of a preset")
        below = _read_preset(base, model)
    return [*below, Layer(origin, _flatten(table, origin, model), chosen)]


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


def _merge(
    layers: Sequence[Layer], kinds: Mapping[str, Any], model: type[Section]
) -> tuple[dict[str, Any], dict[str, str]]:
    """({"section.key": value}, {"section.key": the origin of the value}), every key known and of the engine chosen."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for key in layer.values:
            if key in kinds and key.endswith(".engine"):
                for left in _of_other_engines(values, key, layer.values[key], model):
                    del values[left], origins[left]
        if layer.chosen and _leaves_eval(layer.values, values) and origins.get("data.eval", "").startswith(_PRESET):
            del values["data.eval"], origins["data.eval"]
        values.update(layer.values)
        origins.update(dict.fromkeys(layer.values, layer.origin))
    refuse_old_names(values, origins)
    for key in values:
        if key not in kinds:
            instead = f": {model.instead[key]}" if key in model.instead else _suggest(key, kinds)
            raise UserError(f"unknown setting {short(key)} ({origins[key]}){instead}")
    for section, field in model.model_fields.items():
        key = f"{section}.engine"
        engine = values.get(key, getattr(field.default, "engine", None))
        if others := _of_other_engines(values, key, engine, model):
            owner = next(iter(others.values()))
            theirs = [name for name, engine_of in others.items() if engine_of == owner]
            verb, it = ("is a setting", "it") if len(theirs) == 1 else ("are settings", "them")
            where = ", ".join(dict.fromkeys(origins[name] for name in theirs))
            raise UserError(
                f'{", ".join(theirs)} {verb} of {key} = "{owner}"; this run has "{engine}" ({where}): leave {it} out'
            )
    return values, origins


def _leaves_eval(chosen: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether these settings name other training rows, or a share of them to hold out, and no held-out rows."""
    before = values.get("data.train")
    other = "data.eval_share" in chosen or chosen.get("data.train", before) != before
    return other and "data.eval" not in chosen


def _of_other_engines(values: Mapping[str, Any], key: str, engine: Any, model: type[Section]) -> dict[str, str]:
    """{"section.key": an engine that has it} of settings that `engine` lacks; none where it is no engine."""
    section = key.partition(".")[0]
    alternatives = {
        m.model_fields["engine"].default: m
        for m in kinds_of(model.model_fields[section].annotation)
        if "engine" in m.model_fields
    }
    kind = kind_of_engine(engine)
    if not isinstance(kind, str) or kind not in alternatives:
        return {}
    found = {}
    for setting in values:
        name = setting.partition(".")[2]
        if setting == f"{section}.{name}" and name not in alternatives[kind].model_fields:
            found[setting] = next(o for o, other in alternatives.items() if name in other.model_fields)
    return found


def _check_texts(key: str, value: Any, origin: str) -> None:
    """Raises UserError where a value is nested beyond any setting's need, or holds the one character no path may."""
    level = [value]
    for _ in range(8):
        if any("\0" in item for item in level if isinstance(item, str)):
            raise UserError(f"{key} ({origin}) holds the character NUL: leave it out")
        lists = [item for item in level if isinstance(item, list | tuple)]
        lists += [[*item, *item.values()] for item in level if isinstance(item, Mapping)]
        level = [item for items in lists for item in items]
        if not level:
            return
    raise UserError(f"{key} ({origin}) is nested too deeply: settings are plain values, lists and tables")


def _settle(value: Any, kinds: Sequence[Any]) -> Any:
    if NoneType in kinds and isinstance(value, str) and value.lower() == "none":
        return None
    return tuple(value) if tuple in kinds and isinstance(value, list) else value


def _suggest(word: str, choices: Iterable[str]) -> str:
    choice = nearest(word, choices)
    return f"; did you mean {choice}?" if choice else ""


def _bounded(message: str) -> str:
    """A message that quotes a value, which may be of any length, with its beginning and its end."""
    return message if len(message) <= 1000 else f"{message[:700]} .. {message[-200:]}"


def _sentence(error: ErrorDetails, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """One sentence for one validation error."""
    if error["type"] == "value_error":
        message = _bounded(str(error["ctx"]["error"]))
        named = [f"{key}: {origin}" for key, origin in origins.items() if re.search(rf"{re.escape(key)}\b", message)]
        if not named and (key := ".".join(map(str, error["loc"][:2]))) in origins:
            named = [f"{key}: {origins[key]}"]
        return f"{message} ({', '.join(named)})" if named else message
    section, *path = error["loc"]
    if error["type"] == "union_tag_invalid":
        key = f"{section}.engine"
        engines = error["ctx"]["expected_tags"].replace(", ", " or ").replace(f"'{OWN}'", "module:class")
        return f"{key} = {shown(values[key])} ({origins[key]}) must be {engines}"
    if f"{section}.{path[0]}" not in values:
        del path[0]  # The engine, where a section has alternatives.
    key = f"{section}.{path[0]}"
    inside = "".join(f"[{to_toml(part)}]" for part in path[1:] if error["type"] != "missing")
    inside = f": item {inside}" if inside else ""
    rule = _SENTENCES.get(error["type"], error["msg"].replace("Input should be", "must be"))
    return f"{key} = {shown(values[key])} ({origins[key]}){inside} {rule}"
