"""Finds out-of-bounds accesses, races between programs, and doubled stores in any Triton kernel, under the interpreter.

    with guarded():
        launch_something(...)          # raises OutOfBounds at once, RaceError or DuplicateStore at the end of the block

Within a launch no order holds between programs, so an element that one program stores and another one loads or stores
is a race, whichever of them the interpreter happened to run first. Atomics do not race with each other; they do with
plain accesses, also where a kernel orders those by an atomic counter (split-K with a last program that sums up): such a
kernel cannot be judged by this guard. Accesses inside one program are not checked against each other, except for two
lanes of one store that write the same address.

Bounds are those of the tensors handed to the launch: exactly their elements, not their storages. An access to the gaps
of a strided view is out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bench.offline.interpreter import Kind, Observer, ObserverError, observe, poisoned_lanes

SEVERAL = -1


class GuardError(ObserverError):
    """Something that a kernel must not do."""


class OutOfBounds(GuardError):
    """A lane outside every tensor of the launch. Raised before the access is made: it could end the process."""


class RaceError(GuardError):
    """Two programs of one launch touch the same element, at least one of them by a store."""


class DuplicateStore(GuardError):
    """Two lanes of one store write the same element."""


class _Region:
    """One storage of a launch: which bytes may be touched, and which programs touched them.

    All arrays count in granules, the largest unit that divides every element and offset of the tensors in this storage.
    They are made by np.zeros, which takes memory only where something is written: storages of many GiB are fine.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.base, self.bytes = storage.data_ptr(), storage.nbytes()
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self.granule = 0

    def add(self, position: int, tensor: torch.Tensor) -> None:
        self.tensors.append((position, tensor))
        self.granule = math.gcd(self.granule, tensor.element_size(), tensor.data_ptr() - self.base)

    def seal(self) -> None:
        granules = self.bytes // self.granule
        self.spans: list[tuple[int, int]] = []
        self.elements: np.ndarray | None = None
        for _, tensor in self.tensors:
            if tensor.numel() == 0:
                continue
            per_element = tensor.element_size() // self.granule
            start = (tensor.data_ptr() - self.base) // self.granule
            if tensor.is_contiguous():
                self.spans.append((start, start + tensor.numel() * per_element))
                continue
            if self.elements is None:
                self.elements = np.zeros(granules, dtype=bool)
            strides = [stride * per_element for stride in tensor.stride()]
            touched = torch.from_numpy(self.elements).as_strided((*tensor.shape, per_element), (*strides, 1), start)
            touched.fill_(True)
        self.writer, self.reader, self.updater = (np.zeros(granules, dtype=np.int32) for _ in range(3))
        self.updated = False

    def legal(self, granules: np.ndarray) -> np.ndarray:
        inside = np.zeros(granules.shape, dtype=bool)
        for start, end in self.spans:
            inside |= (granules >= start) & (granules < end)
            if inside.all():
                return inside
        if self.elements is not None:
            inside |= self.elements[granules]
        return inside

    def name(self, granule: int) -> str:
        address = self.base + granule * self.granule
        for position, tensor in self.tensors:
            if tensor.data_ptr() <= address:
                element = (address - tensor.data_ptr()) // tensor.element_size()
                what = f"pointer argument {position} ({tensor.dtype}, {list(tensor.shape)})"
                return f"{what}, {element} elements after its start"
        return f"address {address}"


class Guard(Observer):
    """The observer behind `guarded`. findings: what was found so far, one entry for each kind and launch."""

    def __init__(self) -> None:
        self.findings: list[GuardError] = []
        self._regions: list[_Region] = []
        self._bases = np.zeros(0, dtype=np.uint64)
        self._kernel, self._program, self._grid = "", 0, (1, 1, 1)
        self._seen: set[type[GuardError]] = set()

    def check(self) -> None:
        """Raises the first finding, with the number of the others."""
        if self.findings:
            first, others = self.findings[0], len(self.findings) - 1
            raise type(first)(f"{first}{f' (and {others} more findings)' if others else ''}")

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[torch.Tensor]) -> None:
        self._kernel, self._grid = kernel, grid
        self._seen.clear()
        regions: dict[int, _Region] = {}
        for position, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                regions.setdefault(storage.data_ptr(), _Region(storage)).add(position, tensor)
        self._regions = [regions[base] for base in sorted(regions)]
        for region in self._regions:
            region.seal()
        self._bases = np.array([region.base for region in self._regions], dtype=np.uint64)

    def finished(self) -> None:
        self._regions = []

    def program(self, index: int) -> None:
        self._program = index

    def access(self, kind: Kind, addresses: np.ndarray, itemsize: int) -> None:
        if not addresses.size:
            return
        if kind == "store" and not (addresses[1:] > addresses[:-1]).all():
            distinct = np.unique(addresses).size
            if distinct != addresses.size:
                self._found(DuplicateStore, f"{addresses.size - distinct} of {addresses.size} lanes are stored over")
        which = np.searchsorted(self._bases, addresses, side="right") - 1
        first = int(which[0])
        if (which == first).all():
            self._access_in(first, kind, addresses, itemsize)
        else:
            for region in np.unique(which):
                self._access_in(int(region), kind, addresses[which == region], itemsize)

    def _access_in(self, which: int, kind: Kind, addresses: np.ndarray, itemsize: int) -> None:
        if which < 0:
            raise OutOfBounds(self._say(f"{kind} of {addresses.size} lanes below every tensor"))
        region = self._regions[which]
        offsets = (addresses - np.uint64(region.base)).astype(np.int64)
        beyond = offsets + itemsize > region.bytes
        if beyond.any():
            at = region.name(int(offsets[beyond][0]) // region.granule)
            raise OutOfBounds(self._say(f"{kind} of {int(beyond.sum())} lanes, the first at {at}"))
        granules = offsets // region.granule
        if itemsize > region.granule:
            granules = (granules[:, None] + np.arange(itemsize // region.granule)).ravel()
        legal = region.legal(granules)
        if not legal.all():
            at = region.name(int(granules[~legal][0]))
            raise OutOfBounds(self._say(f"{kind} of {int((~legal).sum())} granules, the first at {at}"))
        self._race_in(region, kind, granules)

    def _race_in(self, region: _Region, kind: Kind, granules: np.ndarray) -> None:
        me = self._program + 1
        written = region.writer[granules]
        self._collide(region, granules, (written != 0) & (written != me), f"{kind} of what another program stores")
        if region.updated and kind != "atomic":
            updated = region.updater[granules]
            other = (updated != 0) & (updated != me)
            self._collide(region, granules, other, f"{kind} of what another program updates atomically")
        if kind != "load":
            read = region.reader[granules]
            self._collide(region, granules, (read != 0) & (read != me), f"{kind} to what another program loads")
        if kind == "store":
            region.writer[granules] = me
            return
        touched = region.reader if kind == "load" else region.updater
        before = touched[granules]
        touched[granules] = np.where((before == 0) | (before == me), me, SEVERAL)
        region.updated |= kind == "atomic"

    def _collide(self, region: _Region, granules: np.ndarray, where: np.ndarray, what: str) -> None:
        if RaceError not in self._seen and where.any():
            self._found(RaceError, f"{what}: {region.name(int(granules[where][0]))}")

    def _found(self, error: type[GuardError], what: str) -> None:
        if error not in self._seen:
            self._seen.add(error)
            self.findings.append(error(self._say(what)))

    def _say(self, what: str) -> str:
        nx, ny, _ = self._grid
        program = (self._program % nx, self._program // nx % ny, self._program // (nx * ny))
        return f"{self._kernel}, program {program} of {self._grid}: {what}"


@contextmanager
def guarded(poison: bool = True) -> Iterator[Guard]:
    """Guards every launch in the block. poison: masked-off lanes of a load without `other` read as NaN.

    Raises OutOfBounds at once, and RaceError or DuplicateStore when the block ends.
    """
    guard = Guard()
    with observe(guard):
        if poison:
            with poisoned_lanes():
                yield guard
        else:
            yield guard
    guard.check()
