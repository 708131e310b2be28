"""A linear layer of a frozen weight with a low-rank adapter (LoRA, arXiv 2106.09685).

    y = x W^T + bias + s (x A^T) B^T
    t = x A^T        d x = d y W + s (d y B) A        d B = s d y^T t        d A = s (d y B)^T x

W gets no gradient: beside x, which a trained W keeps as well, the backward pass keeps t [T, r] alone. Where W is of few
bits (kernels/quantised.py) it is made whole for each of the two products with it, and let go again. Its own layer and
not peft's: a lora.Linear of peft is no nn.Linear, so that whoever looks for one finds nothing to fuse or to prune, and
makes s (x A^T) B^T as a matrix of its own, forward and backward, before it is added.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gadcore.kernels.cpu.linear import onednn_is_faster, onednn_product
from gadcore.kernels.quantised import Kind, Quantised
from gadcore.kernels.quantised_linear import QuantisedLinear, frozen_weight

# What an adapter's parameters are called in their layer.
DOWN, UP = "lora_A", "lora_B"


def lora_linear(
    x: Tensor, weight: Tensor | Quantised, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x weight^T + bias + scale (x a^T) b^T, with gradients for x, a and b, none of second order.

    x: [.., K]; weight: [N, K]; bias: [N] or None; a: [r, K]; b: [N, r]. x, a and b of one dtype, which is the result's,
    [.., N]; weight and bias are cast to it. Raises ValueError for arguments that do not fit.
    """
    if a.dim() != 2 or b.dim() != 2 or tuple(weight.shape) != (len(b), a.shape[1]) or len(a) != b.shape[1]:
        rows, columns = weight.shape
        raise ValueError(
            f"an adapter of a weight {[rows, columns]} has A [r, {columns}] and B [{rows}, r], "
            f"these are {list(a.shape)} and {list(b.shape)}"
        )
    if not x.dtype == a.dtype == b.dtype:
        raise ValueError(f"x, A and B must be of one dtype, are {x.dtype}, {a.dtype} and {b.dtype}")
    return _LoRALinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-any-return]


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same by autograd, from W + s B A as one matrix."""
    return F.linear(x, weight + scale * (b @ a), bias)


def matrix(weight: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    """[N, K] of `dtype`: the weight itself, or made of its bits for the time of a product."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) without gradients, by what is fastest; weight and bias are cast to x's dtype."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.device.type == "cpu" and x.dtype == torch.float32 and onednn_is_faster():
        return onednn_product(x, weight, bias)
    return F.linear(x, weight, bias)


def adapted_product(
    x: Tensor, weight: Tensor | Quantised, bias: Tensor | None, t: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x weight^T + bias + scale t b^T without gradients. x: [T, K]; t = x a^T: [T, r]. Returns [T, N].

    One op: what keeps results of products for the backward pass ("selective") would keep that with weight beside the
    sum, or find it overwritten, and would make a weight of few bits whole once more than the pass needs.
    """
    if isinstance(weight, Quantised):
        w = weight
        return _of_bits(x, w.kind, w.shape[1], w.data, w.scales, w.steps, w.mean, bias, t, b, scale)  # type: ignore[no-any-return]
    return _op(x, weight, bias, t, b, scale)  # type: ignore[no-any-return]


@torch.library.custom_op("gadcore::lora_product", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    return product(x, weight, bias).addmm_(t, b.t(), alpha=scale)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("gadcore::lora_product_of_bits", mutates_args=())
def _of_bits(
    x: Tensor,
    kind: str,
    columns: int,
    data: Tensor,
    scales: Tensor,
    steps: Tensor | None,
    mean: Tensor | None,
    bias: Tensor | None,
    t: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    weight = Quantised(cast(Kind, kind), (len(b), columns), data, scales, steps, mean)
    return product(x, weight.dense(x.dtype), bias).addmm_(t, b.t(), alpha=scale)


@_of_bits.register_fake
def _(
    x: Tensor,
    kind: str,
    columns: int,
    data: Tensor,
    scales: Tensor,
    steps: Tensor | None,
    mean: Tensor | None,
    bias: Tensor | None,
    t: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    return x.new_empty(len(x), len(b))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | Quantised, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        t = rows @ a.t()
        # Bits are nobody's to overwrite or to recompute: they wait as they are.
        ctx.bits = weight if isinstance(weight, Quantised) else None
        ctx.save_for_backward(x, None if ctx.bits else weight, a, b, t)
        ctx.scale = scale
        return adapted_product(rows, weight, bias, t, b, scale).view(*x.shape[:-1], len(b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, t = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        d_t = (rows @ b).mul_(ctx.scale)
        d_a = d_t.t() @ x.reshape(-1, x.shape[-1]) if need_a else None
        d_b = (rows.t() @ t).mul_(ctx.scale) if need_b else None
        d_x = None
        if need_x:
            weight = matrix(ctx.bits or weight, grad.dtype)
            d_x = product(rows, weight.t()).addmm_(d_t, a).view(x.shape)
        return d_x, None, None, d_a, d_b, None


class LoRALinear(nn.Linear):
    """An nn.Linear over another's frozen weight and bias, with an adapter of its own: lora_A [r, K], lora_B [N, r].

    Several layers may stand over one weight: each computes with its own adapter, whatever the others do meanwhile.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, over: nn.Linear, rank: int, scale: float, dtype: torch.dtype) -> None:
        """over: whose weight and bias it takes, as they are, and freezes. A and B: of `dtype`, zero."""
        super().__init__(over.in_features, over.out_features, bias=over.bias is not None, device="meta")
        for name, parameter in over.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            self.register_parameter(name, parameter)
        # The bits are read as `over` reads them.
        self.bits = over.bits if isinstance(over, QuantisedLinear) else None
        device = over.weight.device
        # Not of A, which is empty where it waits off the device.
        self.rank, self.scale = rank, scale
        self.lora_A = nn.Parameter(torch.zeros(rank, over.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(over.out_features, rank, dtype=dtype, device=device))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """A as nn.Linear draws its weight, B zero: the layer computes what it did without its adapter."""
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.rand(self.lora_A.shape, generator=generator, dtype=torch.float32)
        self.lora_A.copy_((2 * drawn - 1) * bound)
        self.lora_B.zero_()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A in float32, of a float64 adapter in float64."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        weight = matrix(frozen_weight(self), dtype)
        return torch.addmm(weight, self.lora_B.to(dtype), self.lora_A.to(dtype), alpha=self.scale)

    @property
    def plain_dtype(self) -> torch.dtype:
        """Of the weight as a plain matrix."""
        return self.weight.dtype if self.bits is None else self.bits.dtype

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        x, a, b = input.to(dtype), self.lora_A.to(dtype), self.lora_B.to(dtype)
        return lora_linear(x, frozen_weight(self), self.bias, a, b, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale}"


def is_adapters(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.rpartition(".")[2] in (DOWN, UP)
