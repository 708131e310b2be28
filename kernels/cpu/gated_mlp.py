"""A gated MLP with its three products, for the CPU: y = (silu(x G^T) * (x U^T)) D^T.

    h = silu(g) u        d h = d y D        d D = d y^T h        d g, d u: kernels/cpu/swiglu.py
    d G = d g^T x        d U = d u^T x      d x = d g G + d u U

h is made again in backward instead of being kept, and d g and d u take the places of h and d h: the backward pass of a
layer holds two matrices of the MLP's width beside what forward kept, not four.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.cpu import native
from gadcore.kernels.cpu.linear import gradient_for, onednn_is_faster, onednn_product
from gadcore.kernels.cpu.swiglu import swiglu

_OPS = ("cpu_swiglu", "cpu_swiglu_backward_in_place", "cpu_weight_gradient")


def available() -> bool:
    """Whether gated_mlp() can be called: where the native library is."""
    return all(map(native.available, _OPS))


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, in_place: bool = False) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T.

    x: [.., H]; gate, up: [I, H]; down: [H', I]; all float32 on the CPU. Returns [.., H']. Gradients go to all four, but
    none of second order. in_place: as in kernels/cpu/linear.py. Raises ValueError for other dtypes or devices,
    RuntimeError without the native library.
    """
    for op in _OPS:
        native.require(op)
    for name, tensor in {"x": x, "gate": gate, "up": up, "down": down}.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"gated_mlp: {name} must be float32 on the CPU, is {tensor.dtype} on {tensor.device}")
    return _GatedMlp.apply(x, gate, up, down, in_place)  # type: ignore[no-any-return]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return onednn_product(x, weight) if onednn_is_faster() else F.linear(x, weight)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, in_place: bool) -> Tensor:
        ctx.adds_to = (gate, up, down) if in_place else (None, None, None)
        g, u = _product(x, gate), _product(x, up)
        ctx.save_for_backward(x, g, u, gate, up, down)
        return _product(swiglu(g, u), down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, gate, up, down = ctx.saved_tensors
        need_x, need_gate, need_up, need_down, _ = ctx.needs_input_grad
        of_gate, of_up, of_down = ctx.adds_to
        h = swiglu(g, u)
        d_down = gradient_for(of_down, grad, h) if need_down else None
        d_h = _product(grad, down.t())
        torch.ops.gadcore.cpu_swiglu_backward_in_place(d_h, g, u, h)
        d_gate = gradient_for(of_gate, h, x) if need_gate else None
        d_up = gradient_for(of_up, d_h, x) if need_up else None
        d_x = _product(h, gate.t()).add_(_product(d_h, up.t())) if need_x else None
        return d_x, d_gate, d_up, d_down, None
