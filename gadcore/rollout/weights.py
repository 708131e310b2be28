"""Where a sampler gets its weights from: a source of named tensors, and the proof that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.distributed.fsdp import reshard_all


class WeightSource(Protocol):
    """The policy's weights as they are now, under the names that the model gives its parameters.

    What an engine takes in an update: whole and plain, or DTensors, of which every rank has its rows.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class PlainWeights:
    """The parameters of a model as they are: whole, or the shards of one that FSDP2 has cut over several ranks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # After a pass without a gradient FSDP2 leaves some parameters whole.
        reshard_all(self.model)
        return ((name, p.detach()) for name, p in self.model.named_parameters())


def row_sums(tensor: Tensor) -> Tensor:
    """[rows] int64, of the bits of every row, on the tensor's device."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(integer).reshape(len(tensor), -1).sum(1, dtype=torch.int64)


def checksums(weights: Iterable[tuple[str, Tensor]]) -> Tensor:
    """[n, 2] int64 over the bits of n tensors, on their device: the host waits for none of them.

    Takes the tensors one by one, so they may be made on the way. Sums over rows: they see rows that differ or were
    exchanged, but not two columns exchanged everywhere.
    """
    found = []
    for _, tensor in weights:
        rows = row_sums(tensor)
        numbers = torch.arange(1, len(rows) + 1, device=rows.device)
        found.append(torch.stack([rows.sum(), (rows * numbers).sum()]))
    return torch.stack(found)


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A checksum over named weights, the same in whatever order and storage they come; one read of the device."""
    names: list[str] = []

    def named() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            names.append(name)
            yield name, tensor

    sums = checksums(named()).tolist()
    total = sum(xxhash.xxh3_128_intdigest(f"{name} {a} {b}".encode()) for name, (a, b) in zip(names, sums, strict=True))
    return total % 2**128
