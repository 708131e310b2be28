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


class Arena:
    """Tensors that live in one buffer on the device, or wait in a tier.

    While they wait they are empty: whatever computes with them then fails instead of computing with something else.
    """

    def __init__(
        self, name: str, tensors: Iterable[Tensor], make_tier: Callable[[int], Tier], *, frozen: bool = False
    ) -> None:
        """Moves the tensors into the buffer; each keeps its identity and its values.

        tensors: of one device. Several may look at the same memory (trainer and engine at the same weights): they do
          so afterwards. Anything that looks at that memory and is not among them keeps the old memory.
        make_tier: given the buffer's bytes.
        frozen: the values never change, and are stored once.
        """
        self.name = name
        self.frozen = frozen
        self._tensors = list(tensors)
        self._places, self.bytes = _layout(self._tensors)
        self.device = self._tensors[0].device
        self.tier = make_tier(self.bytes)
        # What the tier holds is not what the buffer holds.
        self._changed = True
        self._coming: Tensor | None = None
        self._buffer: Tensor | None = self._allocate()
        for tensor, view in zip(self._tensors, self._views(self._buffer), strict=True):
            view.copy_(tensor.detach())
            tensor.data = view

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
            self.tier.store(self._buffer)
            self._changed = False
        for tensor in self._tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)
        self._buffer = None

    def come_soon(self) -> None:
        """Starts loading while something else computes, as far as the tier can."""
        if self._buffer is None and self._coming is None:
            self._coming = self._allocate() if self.tier.loads_ahead else None
            self.tier.start_load(self._coming)

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
        self.tier.close()

    def _allocate(self) -> Tensor:
        return torch.empty(self.bytes, dtype=torch.uint8, device=self.device)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            torch.as_strided(buffer.view(place.dtype), place.shape, place.stride, place.offset // place.dtype.itemsize)
            for place in self._places
        ]


def _layout(tensors: Sequence[Tensor]) -> tuple[list[_Place], int]:
    """Every tensor's place, and the bytes of the whole: memory that several tensors look at is there once."""
    if not tensors or len({tensor.device for tensor in tensors}) > 1:
        raise ValueError("an arena needs tensors, all of one device")
    # Per storage the range of addresses that the tensors cover.
    ranges: dict[int, list[int]] = {}
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)
        covered = ranges.setdefault(tensor.untyped_storage().data_ptr(), [start, end])
        covered[0], covered[1] = min(covered[0], start), max(covered[1], end)
    offsets, size = {}, 0
    for storage, (start, end) in ranges.items():
        offsets[storage] = size - start
        size += -(-(end - start) // _ALIGN) * _ALIGN
    places = [
        _Place(offsets[t.untyped_storage().data_ptr()] + t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors
    ]
    return places, size


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0
