"""What can be wrong with the files of a model directory before anything is made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gadcore.errors import UserError, foreign
from gadcore.files import parse_json

_POINTER = b"version https://git-lfs.github.com/spec/"
# What transformers makes floats of without a word: numbers that mean nothing without the scales of their quantisation.
_FLOATS = ("F64", "F32", "F16", "BF16")
# Settings by the end of their names, and far more than any model has: transformers makes lists of so many items, and
# modules, before anybody sees that weights are missing.
_MOST = (
    (re.compile(r"layers?$"), 1000),
    (re.compile(r"(heads?|groups|experts|labels)$"), 100_000),
    (re.compile(r"(size|dim|rank|embd|inner)$"), 1 << 24),
    (re.compile(r"(positions|position_embeddings|ctx)$"), 1 << 25),
)


def check_pointers(path: str) -> None:
    """Raises UserError where a file in the directory `path` is a git-lfs pointer; a hub id has none."""
    for file in sorted(Path(path).glob("*")) if Path(path).is_dir() else []:
        if not file.is_file():
            continue
        with file.open("rb") as content:
            if content.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}, or "
                    "download the model anew"
                )


def check_weight_files(path: str) -> int:
    """How many numbers the safetensors files in the directory `path` hold; a hub id has none.

    Raises UserError where one of them is damaged or holds quantised weights.
    """
    count = 0
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []:
        if not file.is_file():
            continue
        with foreign(f"{file} is damaged", "download it anew"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                stored = tensors.get_slice(name)
                dtype = stored.get_dtype()
                count += math.prod(stored.get_shape())
                if dtype not in _FLOATS and name.endswith("weight"):
                    raise UserError(
                        f"{file} holds {name} as {dtype}: quantised weights cannot be trained, give the model that was "
                        "quantised"
                    )
    return count


def check_sizes(path: str) -> None:
    """Raises UserError where a config.json here says of the model at `path` that it has a size which none has.

    path: of a directory, or of the file. One that cannot be read is left to whoever needs it.
    """
    file = Path(path) if Path(path).is_file() else Path(path) / "config.json"
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return
    for name, value in _numbers(content):
        for ending, most in _MOST:
            if ending.search(name) and value > most:
                raise UserError(
                    f"{file} says {name} = {value}, and no model has more than {most}: put the file back as it came "
                    "with the model"
                )


def _numbers(content: Any) -> Iterator[tuple[str, float]]:
    """(name, number) in a JSON object and in those inside it."""
    left = [content]
    while left:
        found = left.pop()
        for name, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, int | float):
                yield name, value
            else:
                left.append(value)
