"""Where a sampler gets its weights from: a source of named tensors, and the proof that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.distributed.fsdp import reshard_all
from gadcore.kernels.bits import bit_sums
from gadcore.kernels.quantised_linear import plain_parameters


class WeightSource(Protocol):
    """The policy's weights as they are now, under the names that the model gives its parameters.

    What an engine takes in an update: whole and plain, or DTensors, of which every rank has its rows.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class PlainWeights:
    """The parameters of a model as they are: whole, or the shards of one that FSDP2 has cut over several ranks.

    Those that the model keeps in few bits are made whole one by one, as it computes with them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # After a pass without a gradient FSDP2 leaves some parameters whole.
        reshard_all(self.model)
        return plain_parameters(self.model)


def checksums(weights: Iterable[tuple[str, Tensor]]) -> Tensor:
    """[n, 2] int64 over the bits of n tensors, on their device: the host waits for none of them.

    Takes the tensors one by one, so they may be made on the way. What they see: bit_sums() of kernels/bits.py.
    """
    return torch.stack([bit_sums(tensor) for _, tensor in weights])


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A checksum over named weights, the same in whatever order and storage they come; one read of the device."""
    names: list[str] = []

    def named() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            names.append(name)
            yield name, tensor

    sums = checksums(named()).tolist()
    return of_sums({name: (a, b) for name, (a, b) in zip(names, sums, strict=True)})


def of_sums(sums: Mapping[str, tuple[int, int]]) -> int:
    """fingerprint() of weights whose bit_sums() are there, by their names."""
    return sum(xxhash.xxh3_128_intdigest(f"{name} {a} {b}".encode()) for name, (a, b) in sums.items()) % 2**128
