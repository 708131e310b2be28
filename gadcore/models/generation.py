"""A model's generation_config.json: kept for whoever serves the model, and read by nothing that samples here.

transformers loads one that it then refuses to save, so it is made valid when the model is loaded, not when a run has
ended.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from gadcore.errors import UserError, cause, foreign
from gadcore.text import short

_FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(path: str) -> tuple[GenerationConfig, str | None]:
    """(what a model directory or hub id says of generation, in a form that can be saved; a sentence where that is not
    all that it says).

    Older models say it in config.json. Raises UserError where the file is no JSON object.
    """
    with foreign(f"cannot read {_FILE} of the model {path}"):
        file = cached_file(
            path,
            _FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            found = GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)
            file, content = f"{path}/config.json", found.to_dict()
        else:
            content = _read(file)
    problem = _problem(content)
    if problem is None:
        return GenerationConfig.from_dict(content), None
    # Temperature and its like without do_sample (Vicuna's) are meant for sampling, by whoever wrote them.
    sampling = content | {"do_sample": True}
    if content.get("do_sample") is None and _problem(sampling) is None:
        return GenerationConfig.from_dict(sampling), (
            f"{file} has settings of sampling and no do_sample: the student is saved with do_sample = true"
        )
    ids = {name: content.get(name) for name in _IDS if _is_ids(name, content.get(name))}
    return GenerationConfig.from_dict(ids), f"{file} is not valid ({problem}): the student is saved with its ids alone"


def _read(file: str) -> dict[str, Any]:
    with foreign(f"{file} is no JSON", "mend or delete it, gadcore does not sample by it"), open(file, "rb") as text:
        content = json.load(text)
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object: mend or delete it, gadcore does not sample by it")
    return content


def _problem(content: dict[str, Any]) -> str | None:
    """Why transformers would not save these settings, None where it would."""
    try:
        if wrong := [name for name in _IDS if not _is_ids(name, content.get(name))]:
            raise ValueError(f"{wrong[0]} = {short(repr(content[wrong[0]]))}")
        settings = GenerationConfig.from_dict(dict(content))
        settings.validate(strict=True)
        settings.to_json_string()
        # It would be saved, and then raise in whoever samples by it.
        if settings.do_sample and settings.temperature is not None and not settings.temperature > 0:
            raise ValueError(f"do_sample with temperature = {settings.temperature}")
    except Exception as error:  # Any type may stand in any field.
        return cause(error)
    return None


def _is_ids(name: str, value: Any) -> bool:
    # A text may end in several tokens; it begins in one and is padded with one.
    values = value if isinstance(value, list) and value and name == "eos_token_id" else [value]
    return value is None or all(type(item) is int and item >= 0 for item in values)
