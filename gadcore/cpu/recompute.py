"""Results that the backward pass can compute again for next to nothing: those of norms and of gated activations.

A product keeps its input for the gradient of its matrix. Where that input came from a norm or an activation, whose own
inputs are kept in any case, a recipe is kept in its place: a third of what a layer of fp32 keeps, for about a hundredth
of its time. kernels/cpu/gated_mlp.py, which takes most MLPs, makes its activation again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

Recompute = Callable[[], Tensor]


class Recomputables:
    """Results that were made in a stretch of a forward pass, and how to compute each of them again."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Recompute]] = {}

    def add(self, result: Tensor, recompute: Recompute) -> None:
        # Held, so that no other tensor can take the place of its storage meanwhile.
        self._made[result.untyped_storage()._cdata] = (result.detach(), recompute)

    def of(self, tensor: Tensor) -> Recompute | None:
        """How to compute `tensor` again, which may be a view of all of a result."""
        result, recompute = self._made.get(tensor.untyped_storage()._cdata, (None, None))
        return recompute if result is not None and _extent(result) == _extent(tensor) else None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, recomputable() fills these found; afterwards they are empty and nothing is held by them."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)
            self._made.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        recompute = self.of(tensor)
        # Detached: a result of the node that keeps it would otherwise keep that node.
        return tensor.detach() if recompute is None else _Packed(recompute, tensor.size(), tensor.stride())


def _extent(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.numel(), tensor.dtype


class _Packed(NamedTuple):
    recompute: Recompute
    size: torch.Size
    stride: tuple[int, ...]


_current: ContextVar[Recomputables | None] = ContextVar("found", default=None)


def recomputable(result: Tensor, recompute: Recompute) -> Tensor:
    """Returns `result`, and lets the backward pass make it by `recompute` instead of keeping it, where that is asked
    for.

    recompute: must make the same bits from tensors that are detached and kept anyway; called without gradients, once
    for every product that read the result. result: contiguous.
    """
    found = _current.get()
    if found is not None:
        found.add(result, recompute)
    return result


def recomputing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs); what is recomputable() in it is not kept for backward, but made again there."""
    # Where the caller collects, it packs as well.
    if not torch.is_grad_enabled() or _current.get() is not None:
        return forward(*args, **kwargs)
    found = Recomputables()
    with found.collected(), torch.autograd.graph.saved_tensors_hooks(found.pack, _unpack):
        return forward(*args, **kwargs)


def _unpack(packed: Tensor | _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        return packed.recompute().as_strided(packed.size, packed.stride)
