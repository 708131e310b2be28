"""Checkpoints: whole or absent, checked before use, never pickled.

What goes into one is said in gadcore/checkpoint/state.py.

    checkpoints/step-000012/<name>.safetensors    tensors, one file a name; of several processes one each, in shards
    checkpoints/step-000012/state.json            everything that is not a tensor
    checkpoints/step-000012/manifest.json         size and xxh3_128 checksum of every file

A checkpoint is written into a folder with a temporary name, flushed to the disk and then renamed, so a kill at any
moment leaves the whole checkpoint or none. One job writes to a checkpoints folder at a time: one process here, several
in gadcore/checkpoint/together.py. What either wrote is read by any number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gadcore.checkpoint.shards import Reader
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.files import checksum, clear_temporaries, free_name, sync, temporary, whole_folder

JSON = Any
# Of the manifest: 1 of whole tensors, 2 of shards.
FORMAT, SHARDED = 1, 2
MANIFEST = "manifest.json"
STATE = "state.json"
REPLACED = ".replaced"

_NAME = re.compile(r"step-(\d{6,})(\.replaced)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What load() read.

    step: of the run.
    tensors: group -> tensor name -> CPU tensor, mapped from the file and read when touched; of shards ShardedTensors,
      which put a tensor together when it is asked for. gadcore.models.state.copy_into() reads what a process holds.
    state: what save() was given.
    ranks: processes that wrote it.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, JSON]
    ranks: int = 1


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
    check_arguments(tensors, keep)
    content = json.dumps(dict(state)).encode()
    with new_checkpoint(root, step, keep, pinned) as folder:
        _write(folder, tensors, content)
        write_manifest(folder, step)
    return at(root, step)


def check_arguments(tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
    """Raises ValueError for what no checkpoint can have."""
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint must be kept")
    for name in tensors:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
            raise ValueError(f"{name!r} cannot be a file name")


@contextmanager
def new_checkpoint(root: Path, step: int, keep: int, pinned: int | None) -> Iterator[Path]:
    """An empty folder that is the checkpoint of a step as the block ends; see save(), also for what it raises."""
    target = at(root, step)
    replaced = target.with_name(target.name + REPLACED)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        try:
            with whole_folder(target) as folder:
                yield folder
                _make_room(root, target, step)
        except OSError:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
        sync(root)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write checkpoint {target}: {_reason(error)}; earlier checkpoints are untouched: free some space "
            "or make the folder writable, then resume"
        ) from error
    try:
        if replaced.exists():
            _delete(replaced)
        for found_step, path in _checkpoints(root)[keep:]:
            if found_step != pinned:
                _delete(path)
    except OSError as error:
        raise UserError(f"{target} is saved, but older checkpoints cannot be deleted: {_reason(error)}") from error


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


def load(path: Path, world: World = ALONE) -> Checkpoint:
    """Reads a checkpoint after checking the size and checksum of every file; of several processes each checks some.

    Raises UserError, on all of them, that names the missing or damaged file and the newest sound older checkpoint, if
    there is one.
    """
    with world.agreeing():
        try:
            manifest = _verify(path, world)
        except UserError as error:
            older = _newest_sound_before(path)
            advice = "there is no sound older checkpoint to resume from"
            if older:
                advice = f"resume from {older} instead, by --resume {older.name}"
            raise UserError(f"{error}: {advice}") from error
    state = json.loads((path / STATE).read_bytes())
    if manifest["format"] == SHARDED:
        return Checkpoint(manifest["step"], Reader(path).groups(), state, manifest["ranks"])
    tensors = {
        name.removesuffix(".safetensors"): load_file(path / name)
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["step"], tensors, state)


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    (folder / STATE).write_bytes(state)
    # safetensors creates files that only their owner can read
    mode = (folder / STATE).stat().st_mode
    for name, group in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file(_separate(group), file)
        file.chmod(mode)


def write_manifest(folder: Path, step: int, known: Mapping[str, JSON] | None = None, *, ranks: int = 1) -> None:
    """The last file of a checkpoint. known: sizes and checksums of files of shards, by the `ranks` that wrote them."""
    sharded = {} if known is None else {"ranks": ranks}
    files = {
        file.name: (known or {}).get(file.name) or {"size": file.stat().st_size, "xxh3_128": checksum(file)}
        for file in sorted(folder.iterdir())
    }
    content = {"format": SHARDED if sharded else FORMAT, "step": step, **sharded, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def abandon_after(root: Path, step: int) -> list[Path]:
    """Renames the checkpoints of later steps to abandoned-<name>, the newest first; returns their new places."""
    places = []
    for found_step, path in _checkpoints(root):
        if found_step > step:
            kept = free_name(root / f"abandoned-{path.name}")
            path.rename(kept)
            places.append(kept)
    return places


def _make_room(root: Path, target: Path, step: int) -> None:
    """Renames what the new checkpoint of a step must not meet: those of later steps, and one of the same step."""
    for kept in abandon_after(root, step):
        _log.warning("a checkpoint of a later step than the %d now saved is kept as %s", step, kept)
    if target.exists():
        # Under its second name the old one still counts, should a kill come between the two renames.
        target.rename(target.with_name(target.name + REPLACED))


def _clean(root: Path) -> None:
    clear_temporaries(root)
    for path in root.glob(f"step-*{REPLACED}"):
        original = path.with_name(path.name.removesuffix(REPLACED))
        if original.exists():
            _delete(path)
        else:
            path.rename(original)


def _delete(path: Path) -> None:
    # Renamed first: a kill while files are being removed must not leave something that looks like a checkpoint.
    doomed = temporary(path)
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


def _verify(path: Path, world: World = ALONE) -> dict[str, Any]:
    """The manifest, after every file, or this process's share of them, was compared with it."""
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] not in (FORMAT, SHARDED):
            raise UserError(
                f"{path / MANIFEST} has format {manifest['format']}, this version reads formats {FORMAT} and {SHARDED}"
            )
        expected = {name: (entry["size"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
        if STATE not in expected or not isinstance(manifest["step"], int):
            raise ValueError
        if manifest["format"] == SHARDED and not isinstance(manifest["ranks"], int):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path / MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / MANIFEST} is damaged") from None
    for name, (size, digest) in world.mine(list(expected.items())):
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing")
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size} bytes, {MANIFEST} says {size}")
        if checksum(file) != digest:
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


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(code[1])) if code else str(error)
