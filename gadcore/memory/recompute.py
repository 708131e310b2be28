"""Results that the backward pass can make again for next to nothing: those of norms and of gated activations.

A product keeps its input for the gradient of its matrix. Where that input came from a norm or an activation, whose own
inputs are kept in any case, a recipe is kept in its place: a third of what a layer of fp32 keeps, for about a hundredth
of its time. kernels/gated_mlp.py, which takes most MLPs, makes its activation again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

Again = Callable[[], Tensor]


class Recipes:
    """Results that were made in a stretch of a forward pass, and how to make each of them again."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Again]] = {}

    def add(self, result: Tensor, again: Again) -> None:
        # Held, so that no other tensor can take the place of its storage meanwhile.
        self._made[result.untyped_storage()._cdata] = (result.detach(), again)

    def of(self, tensor: Tensor) -> Again | None:
        """How to make `tensor` again, which may be a view of all of a result."""
        result, again = self._made.get(tensor.untyped_storage()._cdata, (None, None))
        return again if result is not None and _extent(result) == _extent(tensor) else None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, remember() fills these recipes; afterwards they are empty and nothing is held by them."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)
            self._made.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        again = self.of(tensor)
        # Detached: a result of the node that keeps it would otherwise keep that node.
        return tensor.detach() if again is None else _Packed(again, tensor.size(), tensor.stride())


def _extent(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.numel(), tensor.dtype


class _Packed(NamedTuple):
    again: Again
    size: torch.Size
    stride: tuple[int, ...]


_current: ContextVar[Recipes | None] = ContextVar("recipes", default=None)


def remember(result: Tensor, again: Again) -> Tensor:
    """Returns `result`, and lets the backward pass make it by `again` instead of keeping it, where that is asked for.

    again: must make the same bits from tensors that are detached and kept anyway; called without gradients, once for
    every product that read the result. result: contiguous.
    """
    recipes = _current.get()
    if recipes is not None:
        recipes.add(result, again)
    return result


def forward_with_recipes(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs); what it remember()s is not kept for the backward pass, but made again there."""
    # Where the caller collects recipes, it packs as well.
    if not torch.is_grad_enabled() or _current.get() is not None:
        return forward(*args, **kwargs)
    recipes = Recipes()
    with recipes.collected(), torch.autograd.graph.saved_tensors_hooks(recipes.pack, _unpack):
        return forward(*args, **kwargs)


def _unpack(packed: Tensor | _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        return packed.again().as_strided(packed.size, packed.stride)
