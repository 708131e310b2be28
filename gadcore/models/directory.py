"""What can be wrong with the files of a model directory before anything is made of them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from gadcore.errors import UserError, foreign

_POINTER = b"version https://git-lfs.github.com/spec/"
# What transformers makes floats of without a word: numbers that mean nothing without the scales of their quantisation.
_FLOATS = ("F64", "F32", "F16", "BF16")


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


def check_weight_files(path: str) -> None:
    """Raises UserError where a safetensors file in the directory `path` is damaged or holds quantised weights."""
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []:
        if not file.is_file():
            continue
        with foreign(f"{file} is damaged", "download it anew"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                dtype = tensors.get_slice(name).get_dtype()
                if dtype not in _FLOATS and name.endswith("weight"):
                    raise UserError(
                        f"{file} holds {name} as {dtype}: quantised weights cannot be trained, give the model that was "
                        "quantised"
                    )
