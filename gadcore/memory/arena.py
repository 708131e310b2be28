"""An arena: the tensors of one holding in one buffer, so that moving them is one large copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gadcore.memory.tiers import Tier

# Of cache lines, and of what vectorised kernels like best.
_ALIGN = 64


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the buffer, and what it looks like there."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Memory:
    """The part of a storage that tensors look at: addresses from start to end, the buffer's bytes from offset on."""

    start: int
    end: int
    tensors: list[Tensor]
    offset: int = 0

    def content(self) -> Tensor:
        """Its bytes, without a copy."""
        storage = self.tensors[0].untyped_storage()
        view = torch.empty(0, dtype=torch.uint8, device=self.tensors[0].device)
        return view.set_(storage, self.start - storage.data_ptr(), (self.end - self.start,), (1,))


class Arena:
    """Tensors that live in one buffer on the device, or wait in a tier.

    While they wait they are empty: whatever computes with them then fails instead of computing with something else.
    """

    def __init__(
        self, name: str, tensors: Iterable[Tensor], make_tier: Callable[[int], Tier], *, frozen: bool = False
    ) -> None:
        """Moves the tensors into the tier, where they wait at first; each keeps its identity and its values.

        They go one by one, and the device's memory of each is free when the next one goes: a copy of the whole beside
        them is what a large model leaves no room for.
        tensors: of one device. Several may look at the same memory (trainer and engine at the same weights): they do
          so afterwards. Anything that looks at that memory and is not among them keeps the old memory.
        make_tier: given the buffer's bytes.
        frozen: the values never change, and are stored once.
        Raises UserError where the tier fails: what has been moved by then is lost.
        """
        self.name = name
        self.frozen = frozen
        self._tensors = list(tensors)
        self._places, memories, self.bytes = _layout(self._tensors)
        self.device = self._tensors[0].device
        self.tier = make_tier(self.bytes)
        for memory in memories:
            if memory.end > memory.start:
                self.tier.store(memory.content(), memory.offset)
            self._empty(memory.tensors)
        # What the tier holds is not what the buffer holds.
        self._changed = False
        self._coming: Tensor | None = None
        self._buffer: Tensor | None = None

    @property
    def resident(self) -> bool:
        return self._buffer is not None

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that it takes now, those of a load that has been started included."""
        return self.bytes if self.resident or self._coming is not None else 0

    def changed(self) -> None:
        """Says that the values may have changed, and have to be stored when they leave."""
        if self.frozen:
            raise RuntimeError(f"{self.name} was declared not to change")
        self._changed = True

    def leave(self) -> None:
        """Frees the device's memory. Where the tier fails, UserError, and everything is as it was."""
        if self._buffer is None:
            return
        if self._changed:
            self.tier.store(self._buffer, 0)
            self._changed = False
        self._empty(self._tensors)
        self._buffer = None

    def come_soon(self) -> None:
        """Starts loading while something else computes, as far as the tier can."""
        if self._buffer is None and self._coming is None:
            coming = self._allocate() if self.tier.loads_ahead else None
            self.tier.start_load(coming)
            self._coming = coming

    def not_yet(self) -> None:
        """Gives back what come_soon() took, where come() has not followed."""
        if self._coming is not None:
            self.tier.stop_load()
            self._coming = None

    def come(self) -> None:
        """Brings the tensors back. Where the tier fails, UserError, and its copy is as it was."""
        if self._buffer is not None:
            return
        buffer = self._allocate() if self._coming is None else self._coming
        self._coming = None
        self.tier.load(buffer)
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view
        self._buffer = buffer

    def readable(self) -> Sequence[tuple[Tensor, Tensor]]:
        """(tensor, its values in memory that can be read) for every tensor, wherever they are, without a copy."""
        buffer = self.tier.readable() if self._buffer is None else self._buffer
        return list(zip(self._tensors, self._views(buffer), strict=True))

    def close(self) -> None:
        self.not_yet()
        self.tier.close()

    def _allocate(self) -> Tensor:
        return torch.empty(self.bytes, dtype=torch.uint8, device=self.device)

    def _empty(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            torch.as_strided(buffer.view(place.dtype), place.shape, place.stride, place.offset // place.dtype.itemsize)
            for place in self._places
        ]


def _layout(tensors: Sequence[Tensor]) -> tuple[list[_Place], list[_Memory], int]:
    """Every tensor's place, what they look at, and the bytes of the whole: memory of several tensors is there once."""
    if not tensors or len({tensor.device for tensor in tensors}) > 1:
        raise ValueError("an arena needs tensors, all of one device")
    memories: dict[int, _Memory] = {}
    for tensor in tensors:
        start = _start(tensor)
        end = start + _extent(tensor)
        memory = memories.setdefault(tensor.untyped_storage().data_ptr(), _Memory(start, end, []))
        memory.start, memory.end = min(memory.start, start), max(memory.end, end)
        memory.tensors.append(tensor)
    size = 0
    for memory in memories.values():
        memory.offset = size
        size += -(-(memory.end - memory.start) // _ALIGN) * _ALIGN
    places = []
    for tensor in tensors:
        memory = memories[tensor.untyped_storage().data_ptr()]
        offset = memory.offset + _start(tensor) - memory.start
        places.append(_Place(offset, tensor.shape, tensor.stride(), tensor.dtype))
    return places, list(memories.values()), size


def _start(tensor: Tensor) -> int:
    """Where a tensor begins; data_ptr() is 0 of an empty one, whatever memory it looks at."""
    if tensor.numel():
        return tensor.data_ptr()
    return tensor.untyped_storage().data_ptr() + int(tensor.storage_offset()) * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0
