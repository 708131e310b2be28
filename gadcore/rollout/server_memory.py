"""Weights through shared memory, for a trainer and a vLLM server on one machine: a backend of vLLM's weight transfer.

Every rank of the trainer writes its own rows of some tensors into a mapped file; the server's workers load them from
there, by the model's own loader, before the next ones are written. No tensor is gathered, and the file holds a part of
the model, or its largest tensor.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.base import WeightSource as VLLMSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from gadcore.distributed.world import ALONE, World

BACKEND = "gadcore_memory"
# Of the file, where no tensor is larger.
PART_BYTES = 256 << 20
# Where a tensor begins in the file: at a multiple of this.
_ALIGNED = 64


@dataclass
class MemoryInitInfo(WeightTransferInitInfo):
    """path: of the file, on the machine of both. size: its bytes."""

    path: str
    size: int


@dataclass
class MemoryUpdateInfo(WeightTransferUpdateInfo):
    """Whole tensors that the file holds now. offsets: in bytes."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class MemoryWeightTransfer(WeightTransferEngine[MemoryInitInfo, MemoryUpdateInfo]):
    """In the server's workers."""

    init_info_cls = MemoryInitInfo
    update_info_cls = MemoryUpdateInfo
    _memory: Tensor | None = None

    def init_transfer_engine(self, init_info: MemoryInitInfo) -> None:
        self._memory = _mapped(Path(init_info.path), init_info.size)

    def start_weight_update(self) -> None:
        """Nothing: weights stay as the loader stores them (keep_plain_weights), and are written in place."""

    def finish_weight_update(self) -> None:
        """Nothing."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the end of vLLM's, which waits for an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    @torch.no_grad()
    def receive_weights(self, update_info: MemoryUpdateInfo) -> None:
        if self._memory is None:
            raise RuntimeError("no shared memory was named: call init_weight_transfer_engine first")
        places = zip(update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets, strict=True)
        self.model.load_weights(  # type: ignore[operator]
            (name, _view(self._memory, offset, getattr(torch, dtype), shape)) for name, dtype, shape, offset in places
        )

    def shutdown(self) -> None:
        self._memory = None


@dataclass
class MemoryTrainerInfo(TrainerInitInfo):
    """world: the trainer's processes, all on the server's machine."""

    backend: ClassVar[str] = BACKEND

    world: World = ALONE


class MemoryTrainer(TrainerWeightTransferEngine[MemoryTrainerInfo]):
    """In the trainer's processes. The source's tensors may be shards: each rank writes its rows."""

    init_info_cls = MemoryTrainerInfo

    def __init__(self, *, client: VLLMWeightSyncClient, source: VLLMSource, world: World) -> None:
        super().__init__(client=client, source=source, is_sender=world.is_first)
        self._source, self._world = source, world
        self._parts = _parts(source.metadata())
        size = max(_end(part[-1]) for part in self._parts)
        path = _new_file() if world.is_first else Path()
        self._path = world.broadcast_object(path)
        self._memory = _mapped(self._path, size)
        self._init = MemoryInitInfo(str(self._path), size)

    @classmethod
    def trainer_init(
        cls, init_info: MemoryTrainerInfo, *, client: VLLMWeightSyncClient, source: VLLMSource | None = None
    ) -> MemoryTrainer:
        if source is None:
            raise ValueError("weights need a source")
        made = cls(client=client, source=source, world=init_info.world)
        try:
            with made._world.agreeing():
                if made.is_sender:
                    client.init_weight_transfer_engine(asdict(made._init))
        except BaseException:
            made.shutdown()
            raise
        return made

    @torch.no_grad()
    def send_weights(self) -> None:
        with self._world.agreeing():
            if self.is_sender:
                self.client.start_weight_update()
        weights = iter(self._source)
        for part in self._parts:
            for meta, offset in part:
                name, tensor = next(weights)
                if name != meta.name:
                    raise RuntimeError(f"the source yields {name} in place of {meta.name}")
                self._write(tensor, meta, offset)
            self._world.barrier()
            # The others wait in here until the workers have read what all have written.
            with self._world.agreeing():
                if self.is_sender:
                    self.client.update_weights(asdict(_told(part)))
        with self._world.agreeing():
            if self.is_sender:
                self.client.finish_weight_update()

    def _write(self, tensor: Tensor, meta: ParamMeta, offset: int) -> None:
        """This rank's rows, cast."""
        place = _view(self._memory, offset, meta.dtype, meta.shape)
        if not isinstance(tensor, DTensor):
            place.copy_(tensor)
            return
        local = tensor.to_local()
        if local.numel():
            first = self._world.shard * -(-meta.shape[0] // self._world.shards)
            place[first : first + len(local)].copy_(local)

    def shutdown(self) -> None:
        if self._world.is_first:
            self._path.unlink(missing_ok=True)


def register() -> None:
    """Makes vLLM's factories know the backend, in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MemoryWeightTransfer)
        WeightTransferTrainerFactory.register_engine(BACKEND, MemoryTrainer)


Part = list[tuple[ParamMeta, int]]


def _parts(metadata: Sequence[ParamMeta]) -> list[Part]:
    """Tensors that are in the file at a time, with their offsets."""
    parts: list[Part] = []
    for meta in metadata:
        at = -(-_end(parts[-1][-1]) // _ALIGNED) * _ALIGNED if parts else 0
        if not parts or at + _size(meta) > PART_BYTES:
            parts.append([(meta, 0)])
        else:
            parts[-1].append((meta, at))
    return parts


def _size(meta: ParamMeta) -> int:
    return torch.Size(meta.shape).numel() * meta.dtype.itemsize


def _end(placed: tuple[ParamMeta, int]) -> int:
    return placed[1] + _size(placed[0])


def _told(part: Part) -> MemoryUpdateInfo:
    metas = [meta for meta, _ in part]
    return MemoryUpdateInfo(
        [meta.name for meta in metas],
        [str(meta.dtype).removeprefix("torch.") for meta in metas],
        [list(meta.shape) for meta in metas],
        [offset for _, offset in part],
    )


def _new_file() -> Path:
    """An empty file that this user alone may read, in memory where there is such a place."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, name = tempfile.mkstemp(prefix="gadcore-weights-", dir=shared)
    os.close(handle)
    return Path(name)


def _mapped(path: Path, size: int) -> Tensor:
    """[size] bytes of a file, which all who map it see."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + count].view(dtype).view(list(shape))
