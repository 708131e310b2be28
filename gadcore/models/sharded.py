"""Models that no process ever holds as a whole: made on the meta device, read and written shard by shard."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from gadcore.distributed.fsdp import first_row, local, materialise, shard
from gadcore.distributed.world import World
from gadcore.errors import UserError, foreign
from gadcore.models.backbone import ATTENTION
from gadcore.models.checks import check_weights
from gadcore.models.shallow import decoder_layers

# What is read at once: pages of a mapped file count as the process's memory.
_PIECE = 1 << 24


def load_sharded(
    auto: Any, path: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, world: World
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model at `path`, sharded over the processes, each of which reads its own rows; what loading found.

    auto: transformers' class of the kind of model. What from_pretrained() would say of loading is said in its words:
    missing_keys, mismatched_keys, unexpected_keys. Missing weights are 0.
    Raises UserError, on all processes, where the files cannot be read, do not fit the config or hold NaN.
    """
    with foreign(f"cannot load the model {path}"), parameters_on_meta():
        model = auto.from_config(config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False)
    _finish(model, device, world)
    folder = fetch(path, world)
    with world.agreeing():
        files = _files(folder)
    with world.agreeing(), foreign(f"cannot load the model {path}"):
        info = _read(model, files)
    with world.agreeing():
        check_weights(model, info, path)
    return model, info


def copy_sharded(
    model: PreTrainedModel, values: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], world: World
) -> PreTrainedModel:
    """Another model of the same kind, sharded in the same way, which is not trained.

    values: this process's rows of every parameter. dtypes: of the copy's parameters.
    """
    kind: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with parameters_on_meta():
        other: PreTrainedModel = kind._from_config(
            copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=ATTENTION
        )
    other.tie_weights()
    for name, parameter in other.requires_grad_(False).named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    _finish(other, model.device, world)
    for name, parameter in other.named_parameters():
        local(parameter).copy_(values[name])
    return other


def _finish(model: PreTrainedModel, device: torch.device, world: World) -> None:
    """Shards a model whose parameters are on the meta device; the shards have any content then."""
    # Before: FSDP finds what is tied by identity.
    model.tie_weights()
    # Nothing in GAD wants the stochastic behaviour of train().
    shard(model.eval(), decoder_layers(model), world)
    materialise(model, device)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have parameters on the meta device, and real buffers: no checkpoint holds these."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fetch(path: str, world: World) -> Path:
    """Where the files of a directory or a hub id lie; one process of a node downloads, the others find what it left."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    for first in (True, False):
        with world.agreeing():
            if (world.local_rank == 0) == first:
                with foreign(f"cannot download the model {path}"):
                    folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    return folder


def _files(folder: Path) -> dict[str, Path]:
    """Name of every stored tensor -> the file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        with foreign(f"{index} is damaged", "download it anew"):
            named: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in named.items()}
    if not single.is_file():
        raise UserError(f"the model {folder} has no model.safetensors and no index of several: convert its weights")
    with safe_open(single, "pt") as stored:
        return dict.fromkeys(stored.keys(), single)


def _read(model: PreTrainedModel, files: Mapping[str, Path]) -> dict[str, Any]:
    """Fills the shards; see load_sharded()."""
    parameters = dict(model.named_parameters())
    everything = parameters | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    used: set[str] = set()
    missing, mismatched = set(), set()
    for name, tensor in everything.items():
        keys = [key for alias in aliases.get(id(tensor), [name]) for key in _spellings(model, alias) if key in files]
        used.update(keys)
        if not keys:
            # A buffer has been computed.
            if name in parameters:
                missing.add(name)
                local(tensor.detach()).zero_()
            continue
        # Opened for each: the pages of its mapping go with it.
        with safe_open(files[keys[0]], "pt") as stored:
            rows = stored.get_slice(keys[0])
            if tuple(rows.get_shape()) != tuple(tensor.shape):
                mismatched.add((name, tuple(rows.get_shape()), tuple(tensor.shape)))
                continue
            _fill(local(tensor.detach()), rows, first_row(tensor))
    return {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": set(files) - used}


def _spellings(model: PreTrainedModel, name: str) -> list[str]:
    """What a checkpoint may call a weight: of the backbone alone it has no prefix, or one where the model has none."""
    prefix = f"{model.base_model_prefix}."
    return [name, name.removeprefix(prefix), f"{prefix}{name}"]


def _fill(here: Tensor, rows: Any, first: int) -> None:
    if not here.dim():
        here.copy_(rows[...])
        return
    step = max(1, _PIECE // max(1, here[:1].nbytes))
    for start in range(0, len(here), step):
        end = min(start + step, len(here))
        here[start:end].copy_(rows[first + start : first + end])
