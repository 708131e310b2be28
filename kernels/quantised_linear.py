"""A linear layer of a frozen weight of few bits, and how modules keep such a weight.

    y = x W^T + bias        d x = d y W        W: made whole for each product (kernels/quantised.py)

The bits are parameters that nobody trains, so whoever counts, moves, shares or compares a model's parameters finds them
as they are: "weight" is the data, and its parts beside it are called "weight_scales" and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gadcore.kernels.bits import bit_sums
from gadcore.kernels.quantised import Kind, Quantised, quantise

_PARTS = {"scales": "weight_scales", "steps": "weight_steps", "mean": "weight_mean"}


@dataclass(frozen=True)
class Bits:
    """How a layer's bits are to be read. dtype: of the weight before, and of what stands for it outside of products.
    sums: bit_sums() of it, by which the weight is known again that the bits were made of."""

    kind: Kind
    dtype: torch.dtype
    sums: tuple[int, int]


def frozen_weight(layer: nn.Linear) -> Tensor | Quantised:
    """The weight that a layer over frozen weights multiplies by."""
    bits: Bits | None = getattr(layer, "bits", None)
    if bits is None:
        return layer.weight
    parts = {field: getattr(layer, name) for field, name in _PARTS.items() if hasattr(layer, name)}
    return Quantised(bits.kind, (layer.out_features, layer.in_features), layer.weight.data, **parts)


class QuantisedLinear(nn.Linear):
    """An nn.Linear whose weight is kept in few bits; gradients go to its input alone."""

    def __init__(self, over: nn.Linear, kind: Kind, device: torch.device) -> None:
        """over: whose weight is quantised, on `device`, and whose bias it takes there."""
        super().__init__(over.in_features, over.out_features, bias=over.bias is not None, device="meta")
        weight = over.weight.detach().to(device)
        first, second = (0, 0) if weight.is_meta else bit_sums(weight).tolist()
        self.bits = Bits(kind, weight.dtype, (first, second))
        for field, tensor in quantise(weight, kind).tensors().items():
            self.register_parameter(_PARTS.get(field, "weight"), nn.Parameter(tensor, requires_grad=False))
        if over.bias is not None:
            self.bias = nn.Parameter(over.bias.detach().to(device), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return _Frozen.apply(input.to(dtype), frozen_weight(self), self.bias)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.bits.kind}"


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dense(grad.dtype), None, None


def is_part(name: str) -> bool:
    """Whether a parameter of that name says how another one's bits are to be read."""
    return name.rpartition(".")[2] in _PARTS.values()


def layers_of_bits(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> layer, of all whose weight is kept in few bits."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and getattr(module, "bits", None) is not None
    }


def plain_weight(layer: nn.Linear) -> Tensor:
    """A layer's frozen weight as a matrix, where it is kept in few bits of the dtype that it had before."""
    weight = frozen_weight(layer)
    if isinstance(weight, Tensor):
        return weight.detach()
    bits = layer.bits
    assert isinstance(bits, Bits)
    return weight.dense(bits.dtype)


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of a model's parameters, in order; those of few bits as matrices of the dtype that they had, made
    one by one."""
    few = {f"{name}.weight": layer for name, layer in layers_of_bits(model).items()}
    for name, parameter in model.named_parameters():
        if name in few:
            yield name, plain_weight(few[name])
        elif not is_part(name):
            yield name, parameter.detach()
