"""A gated MLP of three adapted linear layers, for the CPU: kernels/cpu/gated_mlp.py with the adapters of
kernels/lora_linear.py on gate, up and down.

    g = x G'^T    u = x U'^T    h = silu(g) u    y = h D'^T        G' = G + s B_g A_g, and so on

The frozen G, U and D, which may be of few bits, get no gradient; h is made again in backward, and d g and d u take the
places of h and d h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.cpu.gated_mlp import available
from gadcore.kernels.cpu.swiglu import swiglu
from gadcore.kernels.lora_linear import adapted_product, matrix, product
from gadcore.kernels.quantised import Quantised

__all__ = ["Adapted", "available", "lora_gated_mlp"]


class Adapted(NamedTuple):
    """weight: [N, K], frozen. a: [r, K]; b: [N, r]. scale: of b a."""

    weight: Tensor | Quantised
    a: Tensor
    b: Tensor
    scale: float


def lora_gated_mlp(x: Tensor, gate: Adapted, up: Adapted, down: Adapted) -> Tensor:
    """(silu(x G'^T) * (x U'^T)) D'^T.

    x: [.., H]; gate, up: of [I, H]; down: of [H', I]; all float32 on the CPU. Returns [.., H']. Gradients go to x and
    the adapters, none of second order. RuntimeError without the native library, see available().
    """
    return _LoRAGatedMlp.apply(x, *gate, *up, *down)  # type: ignore[no-any-return]


class _LoRAGatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        gate, up, down = (Adapted(*parts[i : i + 4]) for i in (0, 4, 8))
        rows = x.reshape(-1, x.shape[-1])
        t_gate, g = _forward(rows, gate)
        t_up, u = _forward(rows, up)
        t_down, y = _forward(swiglu(g, u), down)
        ctx.bits = [part.weight if isinstance(part.weight, Quantised) else None for part in (gate, up, down)]
        weights = [part.weight if isinstance(part.weight, Tensor) else None for part in (gate, up, down)]
        trained = [tensor for part in (gate, up, down) for tensor in (part.a, part.b)]
        ctx.save_for_backward(x, g, u, t_gate, t_up, t_down, *weights, *trained)
        ctx.scales = gate.scale, up.scale, down.scale
        return y.view(*x.shape[:-1], len(down.b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, t_gate, t_up, t_down, *tensors = ctx.saved_tensors
        weights = [bits or weight for bits, weight in zip(ctx.bits, tensors[:3], strict=True)]
        per_part = zip(weights, tensors[3::2], tensors[4::2], ctx.scales, strict=True)
        gate, up, down = (Adapted(*part) for part in per_part)
        rows = x.reshape(-1, x.shape[-1])
        h = swiglu(g, u)
        grad = grad.reshape(-1, grad.shape[-1])
        d_t, d_a, d_b = _of_adapter(grad, h, t_down, down)
        d_h = _of_input(grad, d_t, down)
        torch.ops.gadcore.cpu_swiglu_backward_in_place(d_h, g, u, h)
        # d g in the place of h, d u in that of d h.
        d_t_gate, d_a_gate, d_b_gate = _of_adapter(h, rows, t_gate, gate)
        d_t_up, d_a_up, d_b_up = _of_adapter(d_h, rows, t_up, up)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _of_input(h, d_t_gate, gate).add_(_of_input(d_h, d_t_up, up)).view(x.shape)
        return d_x, None, d_a_gate, d_b_gate, None, None, d_a_up, d_b_up, None, None, d_a, d_b, None


def _forward(x: Tensor, part: Adapted) -> tuple[Tensor, Tensor]:
    """(t, y)."""
    t = x @ part.a.t()
    return t, adapted_product(x, part.weight, None, t, part.b, part.scale)


def _of_adapter(grad: Tensor, x: Tensor, t: Tensor, part: Adapted) -> tuple[Tensor, Tensor, Tensor]:
    """(d t, d A, d B)."""
    d_t = (grad @ part.b).mul_(part.scale)
    return d_t, d_t.t() @ x, (grad.t() @ t).mul_(part.scale)


def _of_input(grad: Tensor, d_t: Tensor, part: Adapted) -> Tensor:
    return product(grad, matrix(part.weight, grad.dtype).t()).addmm_(d_t, part.a)
