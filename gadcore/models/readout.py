"""Figures that a pass leaves on the device, read by the host once a step: every read waits for what is queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gadcore.distributed.world import World


class Readout:
    """Named scalars of a pass, as attributes, and one vector beside them where there is one.

    They are float64 on the device, so that sums over micro-batches are those of Python's numbers. The first attribute
    that is asked for reads all of them; Learner.step() has read them before, together with the gradient's norm.
    """

    def __init__(self, figures: Mapping[str, Tensor], vector: Tensor | None = None, *, tokens: int) -> None:
        """tokens: that went through the model."""
        self.tokens = tokens
        self._names = list(figures)
        scalars = torch.stack([value.double() for value in figures.values()])
        self._pending: Tensor | None = scalars if vector is None else torch.cat([scalars, vector.double()])
        self._values: list[float] = []

    def __getattr__(self, name: str) -> float:
        # Private names are looked for while an object is made or copied, before there is anything to read.
        if name.startswith("_") or name not in self._names:
            raise AttributeError(name)
        return self._read()[self._names.index(name)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Readout) or (self._names, self.tokens) != (other._names, other.tokens):
            return False
        return self._read() == other._read()

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value}" for name, value in zip(self._names, self._read(), strict=False))
        return f"{type(self).__name__}({figures}, tokens={self.tokens})"

    def vector(self) -> list[float]:
        """The vector's entries."""
        return self._read()[len(self._names) :]

    def _read(self) -> list[float]:
        if self._pending is not None:
            read([self])
        return self._values


def together(
    world: World, sums: Mapping[str, Tensor], most: Mapping[str, Tensor], vector: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The figures of all processes, of which each has found its part; on all the same bits, by one collective.

    sums: are added up, in the order of the ranks. most, vector: the greatest counts, for `vector` of every entry.
    """
    if world.size == 1:
        return {**sums, **most}, vector
    # By name: a process without work may have made them in another order.
    sums, most = dict(sorted(sums.items())), dict(sorted(most.items()))
    names = [*sums, *most]
    figures = torch.stack([value.double() for value in (*sums.values(), *most.values())])
    found = world.all_gather(figures if vector is None else torch.cat([figures, vector.double()]))
    added, greatest = found[:, : len(sums)].sum(0), found[:, len(sums) :].amax(0)
    values = torch.cat([added, greatest])
    made = None if vector is None else values[len(names) :].to(vector.dtype)
    return dict(zip(names, values.unbind(), strict=False)), made


def read(readouts: Sequence[Readout], *others: Tensor) -> list[float]:
    """Reads readouts of one device by one copy to the host; returns the values of further scalars, read with them."""
    pending = [r for r in readouts if r._pending is not None]
    tensors = [r._pending for r in pending if r._pending is not None]
    tensors += [other.double().reshape(1) for other in others]
    values: list[float] = torch.cat(tensors).tolist() if tensors else []
    cuts = [0, *accumulate(len(tensor) for tensor in tensors)]
    for readout, (start, end) in zip(pending, pairwise(cuts), strict=False):
        readout._values, readout._pending = values[start:end], None
    return values[len(values) - len(others) :]
