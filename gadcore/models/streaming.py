"""Writing a model that is whole nowhere: an ordinary Hugging Face directory, with one tensor whole at a time."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gadcore.distributed.fsdp import local, whole
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError, cause

_FILE_BYTES = 5 * 10**9
# safetensors' names.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_sharded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    *,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Writes a sharded model as save_streamed() does."""
    tensors = stored(model)

    def whole_of(name: str) -> Tensor:
        return whole(local(tensors[name].detach()), tensors[name])

    save_streamed(model, tokenizer, folder, whole_of, world, file_bytes=file_bytes)


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and those buffers that a checkpoint holds, by their names; tied ones once."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return dict(model.named_parameters()) | buffers


def save_streamed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    whole_of: Callable[[str], Tensor],
    world: World = ALONE,
    *,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Safetensors, config, generation config and tokenizer, as save_model() leaves them; the first process writes.

    model: its tensors say names, shapes and dtypes, and may be on the meta device. whole_of: called by all processes
    for every name, in the same order; of the tensor's dtype. file_bytes: of a file at most, where one tensor is not
    larger. Raises UserError, on all processes, where they cannot be written.
    """
    tensors = stored(model)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=_bytes,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=id,
        max_shard_size=file_bytes,
    )
    error: Exception | None = None
    for name, names in plan.filename_to_tensors.items():
        file: BinaryIO | None = None
        for i, each in enumerate(names):
            # Gathered by all, also after an error of the one that writes: nobody may wait for it.
            tensor = whole_of(each)
            if not world.is_first or error is not None:
                continue
            try:
                if i == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    file = (folder / name).open("wb")
                    file.write(_header({n: tensors[n] for n in names}))
                assert file is not None
                file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            except OSError as raised:
                error = raised
        if file is not None:
            file.close()
    with world.agreeing():
        try:
            if error is not None:
                raise error
            if world.is_first:
                if plan.is_sharded:
                    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
                _write_beside(model, tokenizer, folder)
        except OSError as raised:
            raise UserError(
                f"no model can be written in {folder.parent}: {cause(raised)}; free some space, then go on"
            ) from raised


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _header(tensors: dict[str, Tensor]) -> bytes:
    """The head of a safetensors file that holds these, one behind the other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_beside(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What an ordinary directory has besides weights."""
    config = copy.deepcopy(model.config)
    kind = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    config.architectures, config.dtype = [kind.__name__], model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
