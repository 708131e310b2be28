"""What the suite aot compiles: calls of ops on meta tensors, the shapes of production, and the cases of the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TOKENS, WIDTHS, VOCABULARIES = (4096, 12288), (3584, 5120), (151936, 128256)
FEW_TOKENS = 64
# Response tokens of a sequence, and sequences of a group with their teacher.
SEQUENCE, GROUP = 512, 9
TEMPERATURE, CLIP, KL = 0.8, 0.2, 0.001


@dataclass(frozen=True)
class Shape:
    T: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"T={self.T} V={self.V}"


@dataclass(frozen=True)
class Heads:
    """Attention over groups of a prompt of P tokens with N responses of R each."""

    query_heads: int
    key_heads: int
    D: int
    groups: int = 1
    P: int = 1024
    R: int = SEQUENCE
    N: int = GROUP

    @property
    def T(self) -> int:
        return self.groups * (self.P + self.N * self.R)

    @property
    def H(self) -> int:
        return self.query_heads * self.D

    def __str__(self) -> str:
        return f"{self.groups} x (P={self.P} N={self.N} R={self.R})"


@dataclass(frozen=True)
class AotCase:
    """A call of an op on meta tensors. call(shape, dtype) launches its kernels. variant: what is unusual about it.

    A shape is a `Shape` for what has a head, `Heads` for attention.
    """

    op: str
    impl: str
    call: Callable[[Any, Any], None]
    variant: str = ""
    dtype: str = "bfloat16"


def meta(*sizes: int, dtype: Any) -> Any:
    import torch

    return torch.empty(*sizes, dtype=dtype, device="meta")


def our_cases() -> list[AotCase]:
    return [
        AotCase("linear_logprob forward", "triton", _logprob_forward()),
        AotCase("linear_logprob backward", "triton", _logprob_backward()),
        AotCase("linear_grpo_loss", "triton", _grpo()),
        AotCase("grpo_ratio_loss", "triton", _ratio),
        AotCase("bt_score forward", "triton", _bt_forward),
        AotCase("bt_score backward", "triton", _bt_backward),
    ]


def unusual_cases() -> list[AotCase]:
    both, apart = "bias, entropy", "rows that are not aligned"
    return [
        AotCase("linear_logprob forward", "triton", _logprob_forward(bias=True, entropy=True), both),
        AotCase("linear_logprob backward", "triton", _logprob_backward(bias=True), "bias"),
        AotCase("linear_grpo_loss", "triton", _grpo(bias=True, entropy=True), both),
        AotCase("linear_logprob forward", "triton", _logprob_forward(aligned=False), apart),
        AotCase("linear_logprob backward", "triton", _logprob_backward(aligned=False), apart),
        AotCase("linear_logprob forward", "triton", _logprob_forward(), "float32", "float32"),
        AotCase("linear_logprob backward", "triton", _logprob_backward(), "float32", "float32"),
        AotCase("linear_grpo_loss", "triton", _grpo(), "float32", "float32"),
    ]


def _head(shape: Shape, dtype: Any, bias: bool, aligned: bool = True) -> tuple[Any, Any, Any, Any]:
    import torch

    # One element more in every row of hidden: no row but the first starts at a multiple of 16 bytes.
    hidden = meta(shape.T, shape.H + (not aligned), dtype=dtype)[:, : shape.H]
    head = meta(shape.V, dtype=dtype) if bias else None
    return hidden, meta(shape.V, shape.H, dtype=dtype), head, meta(shape.T, dtype=torch.int64)


def _logprob_forward(bias: bool = False, entropy: bool = False, aligned: bool = True) -> Callable[[Shape, Any], None]:
    def call(shape: Shape, dtype: Any) -> None:
        from gadcore.kernels.triton import linear_logprob

        hidden, weight, head, targets = _head(shape, dtype, bias, aligned)
        linear_logprob.forward(hidden, weight, head, targets, TEMPERATURE, entropy)

    return call


def _logprob_backward(bias: bool = False, aligned: bool = True) -> Callable[[Shape, Any], None]:
    def call(shape: Shape, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import linear_logprob

        hidden, weight, head, targets = _head(shape, dtype, bias, aligned)
        grad, row_max, log_sum = (meta(shape.T, dtype=torch.float32) for _ in range(3))
        linear_logprob.backward(
            grad, hidden, weight, head, targets, row_max, log_sum, TEMPERATURE, True, True, head is not None
        )

    return call


def _grpo(bias: bool = False, entropy: bool = False) -> Callable[[Shape, Any], None]:
    def call(shape: Shape, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import linear_grpo_loss

        hidden, weight, head, targets = _head(shape, dtype, bias)
        advantages, ref = (meta(shape.T, dtype=torch.float32) for _ in range(2))
        needs = (True, True, head is not None)
        linear_grpo_loss.forward(
            hidden, weight, head, targets, advantages, ref, None, TEMPERATURE, CLIP, CLIP, KL, 1.0, entropy, *needs
        )

    return call


def _ratio(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import grpo_ratio_loss

    logprob, advantages, ref, old = (meta(shape.T, dtype=torch.float32) for _ in range(4))
    grpo_ratio_loss.forward(logprob, advantages, ref, old, CLIP, CLIP, KL)


def _sequences(shape: Shape) -> tuple[int, int]:
    sequences = shape.T // SEQUENCE // GROUP * GROUP or GROUP
    return sequences, sequences // GROUP


def _bt_forward(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import bt_score

    sequences, groups = _sequences(shape)
    bt_score.forward(
        meta(shape.T, shape.H, dtype=dtype),
        meta(sequences, dtype=torch.int64),
        meta(shape.H, dtype=torch.float32),
        meta(1, dtype=torch.float32),
        meta(groups + 1, dtype=torch.int64),
        meta(groups, dtype=torch.bool),
    )


def _bt_backward(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import bt_score

    sequences, _ = _sequences(shape)
    bt_score.backward(
        meta(sequences, dtype=torch.float32),
        meta(shape.T, shape.H, dtype=dtype),
        meta(sequences, dtype=torch.int64),
        meta(shape.H, dtype=torch.float32),
    )


# --- Liger-Kernel's --------------------------------------------------------------------------------------------------


def liger_cases() -> list[AotCase]:
    return [
        AotCase("fused linear cross-entropy", "Liger-Kernel", _liger_cross_entropy),
        AotCase("GRPO loss on logits", "Liger-Kernel", _liger_grpo),
        AotCase("selective log-softmax", "Liger-Kernel", _liger_log_softmax),
    ]


def _liger_cross_entropy(shape: Shape, dtype: Any) -> None:
    """Forward, which computes the gradients too; its backward multiplies them by a number that is 1."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    from bench.offline.as_cuda import as_cuda

    hidden, weight, _, targets = _head(shape, dtype, False)
    with as_cuda("meta", scalars=float(shape.T)):
        fused_linear_cross_entropy_forward(hidden, weight, targets, compute_gradients=True, weight_requires_grad=True)


def _liger_grpo(shape: Shape, dtype: Any) -> None:
    import torch
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    rows = shape.T // SEQUENCE
    logits = meta(rows, SEQUENCE + 1, shape.V, dtype=dtype).requires_grad_()
    ids = meta(rows, SEQUENCE, dtype=torch.int64)
    ref = meta(rows, SEQUENCE, dtype=torch.float32)
    advantages = meta(rows, dtype=torch.float32)
    loss, *_ = GrpoLossFunction.apply(
        logits, None, ref, ids, advantages, None, TEMPERATURE, KL, CLIP, CLIP, True, "dapo"
    )
    loss.backward()


def _liger_log_softmax(shape: Shape, dtype: Any) -> None:
    import torch
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    rows = shape.T // SEQUENCE
    logits = meta(rows, SEQUENCE + 1, shape.V, dtype=dtype)
    fused_selective_log_softmax(logits, meta(rows, SEQUENCE, dtype=torch.int64), TEMPERATURE)
