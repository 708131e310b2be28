"""A CPU that counts like a GPU: bytes of live tensors, and of a caching allocator that keeps what they leave."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class DeviceBytes(TorchDispatchMode):
    """Counts the tensors that are made inside the block; as a meter (gadcore.memory.meter) it behaves as CudaMeter.

    live: bytes of tensors now. reserved: what the allocator has, until give_back(); it joins all that is free. Tensors
    that were made outside of the block, for example of a mapped file, are of the host.
    """

    context = 1000

    def __init__(self, limit: int = 1 << 40) -> None:
        super().__init__()
        self.limit = limit
        self.live = self.reserved = self._most = self.peak_live = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._notice(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._notice(tensor, made=True)
        return result

    def _notice(self, tensor: Any, *, made: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = made
        if made:
            self._use(storage.nbytes())
            weakref.finalize(storage, self._use, -storage.nbytes())

    def _use(self, size: int) -> None:
        self.live += size
        self.peak_live = max(self.peak_live, self.live)
        self.reserved = max(self.reserved, self.live)
        self._most = max(self._most, self.reserved)

    # The meter

    def in_use(self) -> int:
        return self.context + self.reserved

    def reset_peak(self) -> None:
        self._most = self.reserved

    def peak(self) -> int:
        return self.in_use() + self._most - self.reserved

    def kept(self) -> int:
        return self.reserved - self.live

    def give_back(self) -> None:
        self.reserved = self.live


def bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class HostTier:
    """As PinnedTier, with host memory that the device does not count."""

    name = "pinned"
    loads_ahead = True

    def __init__(self, size: int) -> None:
        self.kept = bytearray(size)
        self.loading = False

    def store(self, part: Tensor, offset: int) -> None:
        assert not self.loading
        self.kept[offset : offset + len(part)] = part.numpy().tobytes()

    def start_load(self, buffer: Tensor | None) -> None:
        assert buffer is not None
        self.loading = True

    def stop_load(self) -> None:
        self.loading = False

    def load(self, buffer: Tensor) -> None:
        buffer.copy_(torch.frombuffer(self.kept, dtype=torch.uint8))
        self.loading = False

    def readable(self) -> Tensor:
        return torch.frombuffer(self.kept, dtype=torch.uint8)

    def close(self) -> None:
        self.stop_load()
