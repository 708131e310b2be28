"""y = x W^T + bias for the few rows of a decoding step, on CPUs.

A sampler that decodes M sequences multiplies [M, K] by [N, K]^T for every layer and token. For M up to 64 the time
goes into reading the weight, and general matrix products, which copy it into another order first, are slow at that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.cpu import native
from gadcore.kernels.cpu.linear import onednn_is_faster, onednn_product

MAX_ROWS = 64
# (x [M, K], weight [N, K], bias [N] or None) -> [M, N].
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Adapters(NamedTuple):
    """What stands beside a product with W [N, K]: y[:, start : start + n] += scale (x A^T) B^T for every B [n, r].

    down: [sum of r, K], the A of all, one matrix. ups, starts: their B in the same order, and where each begins in y.
    """

    down: Tensor
    ups: list[Tensor]
    starts: list[int]
    scale: float

    def add_to(self, y: Tensor, low: Tensor) -> Tensor:
        """y [.., N] with what stands beside it added in place. low: [.., sum of r], x A^T."""
        rows, columns = (
            y.view(-1, y.shape[-1]),
            low.view(-1, low.shape[-1]).split([b.shape[1] for b in self.ups], dim=1),
        )
        for start, b, its in zip(self.starts, self.ups, columns, strict=True):
            rows[:, start : start + len(b)].addmm_(its, b.t(), alpha=self.scale)
        return y


def beside(product: Product, adapters: Adapters) -> Product:
    """The product of a sampler's layer with what stands beside it added.

    Of up to MAX_ROWS rows in float32 it is one native call where there is one, and `product` is not asked.
    """
    few = torch.ops.gadcore.cpu_adapted_few_rows.default if native.available("cpu_adapted_few_rows") else None

    def adapted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if few is not None and x.dtype == torch.float32 and x.dim() == 2 and 1 <= len(x) <= MAX_ROWS:
            return few(x, weight, bias, *adapters)  # type: ignore[no-any-return]
        return adapters.add_to(product(x, weight, bias), product(x, adapters.down, None))

    return adapted


def linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: native.Impl = "auto") -> Tensor:
    """F.linear(x, weight, bias) for inference.

    x: [M, K]; weight: [N, K]; bias: [N] or None. Returns [M, N] in their dtype. "cpu" computes float32 on the CPU for
    1 <= M <= 64 and has no gradient; "auto" takes it there when no gradient is wanted, and F.linear ("reference")
    otherwise. Raises ValueError for arguments that do not fit, RuntimeError for an `impl` that is not there.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [M, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    )
    few = 1 <= len(x) <= MAX_ROWS
    if impl == "auto" and (wants_gradient or not few):
        return F.linear(x, weight, bias)
    chosen = native.choose("linear_few_rows", impl, x)
    if chosen == "reference":
        return F.linear(x, weight, bias)
    if not few:
        raise ValueError(f'linear_few_rows: impl="cpu" takes 1 to {MAX_ROWS} rows, got {len(x)}')
    if wants_gradient:
        raise ValueError('linear_few_rows: impl="cpu" has no gradient: call it under torch.no_grad()')
    return _op(x, weight, bias)


def decoding_linear() -> Product:
    """The product of the layers of a sampler, on the CPU.

    It computes what linear_few_rows(impl="auto") computes without a gradient, or linear(impl="auto") for more rows, but
    chooses by the number of rows alone: a decoding step calls it hundreds of times, and the full choice cost 4 % of the
    step. All tensors must be of one dtype.
    """
    many = onednn_product if onednn_is_faster() else F.linear
    few = torch.ops.gadcore.cpu_linear_few_rows.default if native.available("cpu_linear_few_rows") else None

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        if few is not None and x.dim() == 2 and 1 <= len(x) <= MAX_ROWS:
            return few(x, weight, bias)  # type: ignore[no-any-return]
        return many(x, weight, bias)

    return product


@torch.library.custom_op("gadcore::linear_few_rows", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return native.function("linear_few_rows")(x, weight, bias)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
