"""Tensors of a checkpoint that several processes write: what each holds, in safetensors files of its own.

    student-00001-of-00004.safetensors     what the first of four processes wrote of the group of tensors "student"

torch.distributed.checkpoint (DCP) plans who writes what, a copy of a copy once, and reads what anybody needs: so many
processes or others, or one. A file's header says where its pieces lie in the whole tensors, in DCP's own words; there
is no index beside the files, and no pickle. DCP's writer for safetensors joins a file in memory before it writes it,
and names files otherwise: writing is done here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gadcore.errors import UserError, cause
from gadcore.files import checksum, sync

# Between the name of a group and that of a tensor in it, which has none.
_OF = "/"


class Writer(HuggingFaceStorageWriter):
    """Writes what DCP has planned for this process into `folder`, a file a group.

    files: name -> size and checksum of what was written and is on the disk, for the manifest.
    """

    def __init__(self, folder: Path, rank: int, size: int, *, like: Path) -> None:
        """rank, size: of this process in the job. like: a file that has the permissions for others."""
        super().__init__(path=str(folder), save_distributed=True)
        self.folder, self._rank, self._size = folder, rank, size
        # safetensors creates files that only their owner can read
        self._mode = like.stat().st_mode
        self.files: dict[str, dict[str, int | str]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(item.index.fqn.partition(_OF)[0], []).append(item)
        for name, items in groups.items():
            file = self.folder / f"{name}-{self._rank + 1:05d}-of-{self._size:05d}.safetensors"
            self._write(file, items, planner)
            self.files[file.name] = {"size": file.stat().st_size, "xxh3_128": checksum(file)}
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write(self, file: Path, items: list[WriteItem], planner: SavePlanner) -> None:
        tensors, places = {}, {}
        for item in items:
            fqn, data = item.index.fqn, planner.resolve_data(item)
            assert isinstance(data, Tensor) and item.tensor_data is not None
            # Apart: a tensor may be the view of a buffer that others lie in as well.
            tensors[fqn] = data.detach().contiguous()
            places[fqn] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        header = {
            CUSTOM_METADATA_KEY: json.dumps(places), DCP_VERSION_KEY: str(HF_DCP_VERSION), FORMAT_KEY: FORMAT_VALUE,
        }  # fmt: skip
        save_file(tensors, file, metadata=header)
        file.chmod(self._mode)
        sync(file)


def write(tensors: Mapping[str, Mapping[str, Tensor]], writer: Writer, group: ProcessGroup | None) -> None:
    """Writes group -> name -> tensor: DTensors in shards, others once. Every process of `group` calls it.

    Raises UserError on all of them where one cannot write.
    """
    flat = {f"{name}{_OF}{key}": tensor for name, of in tensors.items() for key, tensor in of.items()}
    try:
        dcp.save(flat, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _as_user_error(f"cannot write a checkpoint in {writer.folder.parent}", error) from error


class ShardedTensors(Mapping[str, Tensor]):
    """One group of the tensors in shards: a mapping that reads a whole tensor when it is asked for one."""

    def __init__(self, reader: Reader, group: str) -> None:
        self._reader, self._group = reader, group
        prefix = f"{group}{_OF}"
        self._known: dict[str, TensorStorageMetadata] = {
            fqn.removeprefix(prefix): known for fqn, known in reader.known().items() if fqn.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.facts()[name]
        whole = torch.empty(shape, dtype=dtype)
        self.read_into({name: whole})
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def facts(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor as a whole; nothing is read for it."""
        return {name: (known.size, known.properties.dtype) for name, known in self._known.items()}

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Reads into tensors of these names: into a DTensor what it holds here, into others the whole.

        Raises UserError where a file cannot be read, or a shape is another one.
        """
        flat = {f"{self._group}{_OF}{name}": target for name, target in targets.items()}
        try:
            with warnings.catch_warnings():
                # That it reads for this process alone, which it does.
                warnings.simplefilter("ignore")
                dcp.load(flat, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            raise _as_user_error(f"cannot read {self._reader.path}", error) from error


class Reader(HuggingFaceStorageReader):
    """Reads files of Writers; their headers once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(path=str(folder))
        self._headers: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._headers is None:
            self._headers = super().read_metadata()
        return self._headers

    def known(self) -> dict[str, TensorStorageMetadata]:
        """By the names of groups and tensors."""
        found = self.read_metadata().state_dict_metadata
        return {fqn: known for fqn, known in found.items() if isinstance(known, TensorStorageMetadata)}

    def groups(self) -> dict[str, ShardedTensors]:
        names = dict.fromkeys(fqn.partition(_OF)[0] for fqn in self.known())
        return {name: ShardedTensors(self, name) for name in names}


def _as_user_error(what: str, error: CheckpointException) -> UserError:
    """The first process's failure, in one sentence."""
    rank, (failure, _) = min(error.failures.items())
    why = failure.strerror if isinstance(failure, OSError) else None
    return UserError(f"{what}: rank {rank}: {why or cause(failure)}")
