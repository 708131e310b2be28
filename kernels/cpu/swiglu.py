"""The gated activation of an MLP, in one pass each way.

    y = silu(gate) up        silu(g) = g s,    s = 1 / (1 + exp(-g))
    d up = d y silu(gate)        d gate = d y up (s + silu(gate) (1 - s))

silu is computed again in backward, so nothing but gate and up is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.cpu import native


def swiglu(gate: Tensor, up: Tensor, *, impl: native.Impl = "auto") -> Tensor:
    """silu(gate) * up. Both of one shape and dtype, as the result; gradients go to both.

    "cpu" computes float32, "reference" everything. Raises ValueError for arguments that do not fit, RuntimeError for an
    `impl` that is not there.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be of one shape and dtype, are {list(gate.shape)} {gate.dtype} and "
            f"{list(up.shape)} {up.dtype}"
        )
    chosen = native.choose("swiglu", impl, gate)
    return F.silu(gate) * up if chosen == "reference" else _op(gate, up)


@torch.library.custom_op("gadcore::swiglu", mutates_args=())
def _op(gate: Tensor, up: Tensor) -> Tensor:
    return native.function("swiglu")(gate, up)


@_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("gadcore::swiglu_backward", mutates_args=())
def _op_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up)."""
    return native.function("swiglu", "backward")(grad, gate, up)


@_op_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _op_backward(grad, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup_context)
