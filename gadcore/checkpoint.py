"""Checkpoints: whole or absent, checked before use, never pickled.

    checkpoints/step-000012/<name>.safetensors    tensors, one file a name
    checkpoints/step-000012/state.json            everything that is not a tensor
    checkpoints/step-000012/manifest.json         size and xxh3_128 checksum of every file

A checkpoint is written into a folder whose name starts with ".tmp-", flushed to the disk and then renamed, so a kill
at any moment leaves the whole checkpoint or none. One process writes to a checkpoints folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gadcore.errors import UserError

JSON = Any
FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".tmp-"
REPLACED = ".replaced"

_NAME = re.compile(r"step-(\d{6,})(\.replaced)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What load() read.

    step: of the run.
    tensors: file name without suffix -> tensor name -> CPU tensor, mapped from the file and read when touched.
    state: what save() was given.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, JSON]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int,
    *,
    pinned: int | None = None,
) -> Path:
    """Writes root/step-<step>, then deletes all but the `keep` newest checkpoints; returns the new folder.

    pinned: step of one more checkpoint that is not deleted, wherever it stands.

    tensors: file name -> tensor name -> dense tensor of any device. Tensors that overlap in memory, or are not
    contiguous, are written as copies of their own; a tied weight is written once for every name it is given under.
    A checkpoint of the same step is replaced. One of a later step (the run went on from an older checkpoint) is
    renamed to abandoned-step-<step>, so that latest() finds the new one, and is never deleted.
    Raises UserError where the folder cannot be written, a full disk for example; nothing half-written is left and
    earlier checkpoints are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint must be kept")
    for name in tensors:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
            raise ValueError(f"{name!r} cannot be a file name")
    state_bytes = json.dumps(dict(state)).encode()
    target = at(root, step)
    temporary = root / f"{TEMPORARY}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        temporary.mkdir()
        _write(temporary, step, tensors, state_bytes)
        _put_in_place(root, temporary, target, step)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write checkpoint {target}: {_reason(error)}; earlier checkpoints are untouched: free some space "
            "or make the folder writable, then resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        replaced = root / (target.name + REPLACED)
        if replaced.exists():
            _delete(replaced)
        for found_step, path in _checkpoints(root)[keep:]:
            if found_step != pinned:
                _delete(path)
    except OSError as error:
        raise UserError(f"{target} is saved, but older checkpoints cannot be deleted: {_reason(error)}") from error
    return target


def at(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return root / f"step-{step:06d}"


def latest(root: Path) -> Path | None:
    """The newest checkpoint of a checkpoints folder, None where there is none. load() says whether it is sound."""
    found = _checkpoints(root)
    return found[0][1] if found else None


def available(root: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint in a checkpoints folder, by rising step."""
    # Of one step the replacement comes after the replaced, and stays.
    return {step: path for step, path in reversed(_checkpoints(root))}


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking the size and checksum of every file.

    Raises UserError that names the missing or damaged file and the newest sound older checkpoint, if there is one.
    """
    try:
        manifest = _verify(path)
    except UserError as error:
        older = _newest_sound_before(path)
        advice = f"resume from {older} instead" if older else "there is no sound older checkpoint to resume from"
        raise UserError(f"{error}: {advice}") from error
    tensors = {
        name.removesuffix(".safetensors"): load_file(path / name)
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["step"], tensors, json.loads((path / STATE).read_bytes()))


@torch.no_grad()
def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: str) -> None:
    """Copies a checkpoint's tensors into the parameters of these names.

    model: "student" or "discriminator", for the message. Raises UserError, with the parameters as they were, where
    names or shapes are not the same.
    """
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if here != saved:
        name = min(name for name in here.keys() | saved.keys() if here.get(name) != saved.get(name))
        raise UserError(
            f"the checkpoint holds another {model} than {model}.model: its {name} is "
            f"{_shape(saved.get(name))}, the model's {_shape(here.get(name))}; keep the {model}.model of the run"
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of AdamW and its kin as "<parameter name>.<key>" -> tensor (exp_avg, exp_avg_sq, step), no copies.

    names: name -> parameter, as dict(model.named_parameters()). Parameters without state (no step yet, or never a
    gradient) have no entries. Hyper-parameters are not included: the configuration rules.
    """
    result = {}
    for name, parameter in _managed(optimizer, names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the optimizer's state {key!r} of {name} is not a tensor: {type(value).__name__}")
            result[f"{name}.{key}"] = value
    return result


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]
) -> None:
    """Replaces the optimizer's whole state by copies of what optimizer_tensors() gave, to the bit.

    Raises UserError, with the optimizer as it was, where a tensor belongs to no parameter or does not fit it.
    """
    managed = _managed(optimizer, names)
    at_device = {
        parameter: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    restored: dict[Tensor, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in managed:
            raise UserError(
                f"the checkpoint has the optimizer state {full_name}, but the optimizer has no parameter {name!r}: "
                "resume with the model that the checkpoint was made with"
            )
        parameter = managed[name]
        if key == "step":
            copy = tensor.to(parameter.device if at_device[parameter] else "cpu", copy=True)
        elif tensor.shape == parameter.shape and tensor.dtype == parameter.dtype:
            copy = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        else:
            raise UserError(
                f"the checkpoint's optimizer state {full_name} is {tensor.dtype} {list(tensor.shape)}, the parameter "
                f"is {parameter.dtype} {list(parameter.shape)}: resume with the model and dtype of the checkpoint"
            )
        restored.setdefault(parameter, {})[key] = copy
    keys = {frozenset(state) for state in restored.values()}
    if len(keys) > 1 or any("step" not in each for each in keys):
        raise UserError("the checkpoint's optimizer state is incomplete for some parameters: resume from another one")
    for parameter, state in restored.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            # Into the memory that is there: others may look at it.
            state[key] = value.copy_(state[key])
    for parameter in managed.values():
        if parameter not in restored:
            for value in optimizer.state.get(parameter, {}).values():
                value.zero_()
    optimizer.state.update(restored)


class RngState(NamedTuple):
    """Generator states: `state` for JSON (python, numpy), `tensors` (torch: cpu, cuda:0, cuda:1, ..)."""

    state: dict[str, JSON]
    tensors: dict[str, Tensor]


def rng_state() -> RngState:
    """The states of python's random, numpy's global generator, torch's CPU generator and those of all GPUs."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return RngState(state, tensors)


def restore_rng(rng: RngState) -> None:
    """Sets what rng_state() gave. A GPU that is not here, or was not there, is told of in a warning."""
    version, words, gauss = rng.state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(rng.state["numpy"]))
    torch.set_rng_state(rng.tensors["cpu"])
    here = {f"cuda:{i}" for i in range(torch.cuda.device_count())}
    saved = set(rng.tensors) - {"cpu"}
    for device in sorted(here & saved):
        torch.cuda.set_rng_state(rng.tensors[device], device)
    if here != saved:
        _log.warning("random states not restored, because the GPUs differ: %s", ", ".join(sorted(here ^ saved)))


def _managed(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> parameter for every parameter of the optimizer."""
    name_of: dict[Tensor, str] = {}
    for name, parameter in names.items():
        name_of.setdefault(parameter, name)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [tuple(parameter.shape) for parameter in parameters if parameter not in name_of]
    if missing:
        raise ValueError(f"the optimizer has parameters that `names` lacks, of shapes {missing}")
    return {name_of[parameter]: parameter for parameter in parameters}


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    (folder / STATE).write_bytes(state)
    # safetensors creates files that only their owner can read
    mode = (folder / STATE).stat().st_mode
    for name, group in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file(_separate(group), file)
        file.chmod(mode)
    files = {file.name: {"size": file.stat().st_size, "xxh3_128": _checksum(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _put_in_place(root: Path, temporary: Path, target: Path, step: int) -> None:
    for found_step, path in _checkpoints(root):
        if found_step > step:
            kept = _free_name(root / f"abandoned-{path.name}")
            path.rename(kept)
            _log.warning("checkpoint %s is of a later step than the %d now saved: kept as %s", path, step, kept)
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        # Under its second name the old one still counts, should a kill come between the two renames.
        target.rename(replaced)
    try:
        temporary.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    _sync(root)


def _clean(root: Path) -> None:
    for path in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)
    for path in root.glob(f"step-*{REPLACED}"):
        original = path.with_name(path.name.removesuffix(REPLACED))
        if original.exists():
            _delete(path)
        else:
            path.rename(original)


def _delete(path: Path) -> None:
    # Renamed first: a kill while files are being removed must not leave something that looks like a checkpoint.
    doomed = path.with_name(f"{TEMPORARY}delete-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder), the newest first; of one step, the replacement before the replaced."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _newest_sound_before(path: Path) -> Path | None:
    match = _NAME.fullmatch(path.name)
    for step, other in _checkpoints(path.parent):
        if other == path or (match and step > int(match[1])):
            continue
        try:
            _verify(other)
        except UserError:
            continue
        return other
    return None


def _verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it."""
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path / MANIFEST} has format {manifest['format']}, this version reads format {FORMAT}")
        expected = {name: (entry["size"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
        if STATE not in expected or not isinstance(manifest["step"], int):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path / MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / MANIFEST} is damaged") from None
    for name, (size, checksum) in expected.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing")
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size} bytes, {MANIFEST} says {size}")
        if _checksum(file) != checksum:
            raise UserError(f"{file} is damaged (its checksum is not the one in {MANIFEST})")
    return manifest


def _separate(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and without common memory; copies only where it must."""
    result = {name: tensor.detach().contiguous() for name, tensor in group.items()}
    end: dict[tuple[torch.device, int], int] = {}
    for name, tensor in sorted(result.items(), key=lambda item: item[1].data_ptr()):
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.data_ptr() < end.get(storage, 0):
            result[name] = tensor.clone()
        else:
            end[storage] = tensor.data_ptr() + tensor.nbytes
    return result


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(path: Path) -> Path:
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(code[1])) if code else str(error)
