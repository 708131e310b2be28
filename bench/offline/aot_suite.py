"""Every Triton kernel, compiled by its own launch code for GPUs that need not be there, at production shapes.

The gate, for ours: no spills, a matrix instruction of the target's fast kind where there is a dot, shared memory within
the target's limit. Liger-Kernel's kernels for the same work are read in the same way, and not judged.

One row is one piece of machine code: a kernel, in one configuration that its autotuner may choose, for one target.
Shapes that lead to the same code share it; `programs` gives the size of the grid for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TARGETS = (80, 90, 100)
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


def run(quick: bool) -> list[dict[str, Any]]:
    """Rows of the suite; quick: one shape, for sm_90. Raises RuntimeError in a process with TRITON_INTERPRET=1."""
    import torch

    from bench.offline.aot import resources
    from bench.offline.fakegpu import compile_only

    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for target in (90,) if quick else TARGETS:
        for case, shape in _cases(quick):
            with compile_only(target) as launches:
                case.call(shape, getattr(torch, case.dtype))
            for launch in launches:
                found = resources(launch)
                key = (case.op, case.variant, case.dtype, case.impl, launch.compiled.hash)
                if key not in rows:
                    rows[key] = _row(case, shape, target, launch, found)
                grids = rows[key]["programs"]
                if (grid := f"{shape}: {launch.programs}") not in grids:
                    grids.append(grid)
    return [{**row, "programs": ", ".join(row["programs"])} for row in rows.values()]


def _row(case: AotCase, shape: Shape | Heads, target: int, launch: Any, found: Any) -> dict[str, Any]:
    faults = found.faults()
    instructions = found.instructions
    row = {
        "op": case.op,
        "variant": case.variant,
        "impl": case.impl,
        "dtype": case.dtype,
        "kernel": launch.kernel,
        "config": _config(launch.config, found),
        "target": f"sm_{target}",
        "H": shape.H,
        "programs": [],
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "LDL_and_STL": found.local_accesses,
        "shared_bytes": found.shared_bytes,
        "tensor_memory": found.tensor_memory,
        "programs_of_sm": found.programs_of_sm,
        "occupancy": found.occupancy,
        "products": found.products,
        **{name: instructions.get(name, 0) for name in ("HMMA", "HGMMA", "UTCMMA", "UTMALDG", "LDGSTS", "ATOMIC")},
        "serialised": found.serialised,
        "faults": "; ".join(faults),
        "seconds": round(launch.seconds, 2),
    }
    # Liger's is reported and not judged: its faults are no failure of this suite.
    return {**row, "gate": "fail" if faults else "pass"} if case.impl == "triton" else row


def _config(config: dict[str, Any], found: Any) -> str:
    blocks = [f"{name}={value}" for name, value in config.items() if name.isupper()]
    return " ".join([*blocks, f"warps={found.warps}", f"stages={found.stages}"])


def _cases(quick: bool) -> Iterator[tuple[AotCase, Shape | Heads]]:
    production = [Shape(*sizes) for sizes in itertools.product(TOKENS, WIDTHS, VOCABULARIES)]
    few = Shape(FEW_TOKENS, WIDTHS[0], VOCABULARIES[0])
    plain, unusual, liger = _ours(), _unusual(), _liger()
    for case in plain:
        yield from ((case, shape) for shape in (production[:1] if quick else production))
    if not quick:
        yield from ((case, shape) for case in unusual for shape in production[:1])
        yield from ((case, few) for case in plain if case.op.startswith("linear_logprob"))
    yield from _attention(quick)
    yield from _rotary(quick)
    yield from _rows_by_index(quick)
    for case in liger:
        yield from ((case, shape) for shape in (production[:1] if quick else production))


def _meta(*sizes: int, dtype: Any) -> Any:
    import torch

    return torch.empty(*sizes, dtype=dtype, device="meta")


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours() -> list[AotCase]:
    return [
        AotCase("linear_logprob forward", "triton", _logprob_forward()),
        AotCase("linear_logprob backward", "triton", _logprob_backward()),
        AotCase("linear_grpo_loss", "triton", _grpo()),
        AotCase("grpo_ratio_loss", "triton", _ratio),
        AotCase("bt_score forward", "triton", _bt_forward),
        AotCase("bt_score backward", "triton", _bt_backward),
    ]


def _unusual() -> list[AotCase]:
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
    hidden = _meta(shape.T, shape.H + (not aligned), dtype=dtype)[:, : shape.H]
    head = _meta(shape.V, dtype=dtype) if bias else None
    return hidden, _meta(shape.V, shape.H, dtype=dtype), head, _meta(shape.T, dtype=torch.int64)


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
        grad, row_max, log_sum = (_meta(shape.T, dtype=torch.float32) for _ in range(3))
        linear_logprob.backward(
            grad, hidden, weight, head, targets, row_max, log_sum, TEMPERATURE, True, True, head is not None
        )

    return call


def _grpo(bias: bool = False, entropy: bool = False) -> Callable[[Shape, Any], None]:
    def call(shape: Shape, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import linear_grpo_loss

        hidden, weight, head, targets = _head(shape, dtype, bias)
        advantages, ref = (_meta(shape.T, dtype=torch.float32) for _ in range(2))
        needs = (True, True, head is not None)
        linear_grpo_loss.forward(
            hidden, weight, head, targets, advantages, ref, None, TEMPERATURE, CLIP, CLIP, KL, 1.0, entropy, *needs
        )

    return call


def _ratio(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import grpo_ratio_loss

    logprob, advantages, ref, old = (_meta(shape.T, dtype=torch.float32) for _ in range(4))
    grpo_ratio_loss.forward(logprob, advantages, ref, old, CLIP, CLIP, KL)


def _sequences(shape: Shape) -> tuple[int, int]:
    sequences = shape.T // SEQUENCE // GROUP * GROUP or GROUP
    return sequences, sequences // GROUP


def _bt_forward(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import bt_score

    sequences, groups = _sequences(shape)
    bt_score.forward(
        _meta(shape.T, shape.H, dtype=dtype),
        _meta(sequences, dtype=torch.int64),
        _meta(shape.H, dtype=torch.float32),
        _meta(1, dtype=torch.float32),
        _meta(groups + 1, dtype=torch.int64),
        _meta(groups, dtype=torch.bool),
    )


def _bt_backward(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import bt_score

    sequences, _ = _sequences(shape)
    bt_score.backward(
        _meta(sequences, dtype=torch.float32),
        _meta(shape.T, shape.H, dtype=dtype),
        _meta(sequences, dtype=torch.int64),
        _meta(shape.H, dtype=torch.float32),
    )


def _attention(quick: bool) -> Iterator[tuple[AotCase, Heads]]:
    """Head sizes and groupings of Llama-3 and Qwen2.5-7B, of SmolLM2-135M, and of Phi-3-mini."""
    variants = [("", Heads(32, 8, 128), 0)]
    if not quick:
        variants += [
            ("", Heads(32, 8, 128, groups=4), 0),
            ("", Heads(28, 4, 128), 0),
            ("", Heads(9, 3, 64), 0),
            ("", Heads(32, 32, 96), 0),
            ("window", Heads(32, 8, 128), 512),
        ]
    for variant, heads, window in variants:
        name = f"D={heads.D}, {heads.query_heads} query heads over {heads.key_heads}"
        variant = ", ".join(filter(None, [name, variant]))
        for op, call in (("forward", _attention_forward(window)), ("backward", _attention_backward(window))):
            yield AotCase(f"prefix_attention {op}", "triton", call, variant), heads


def _attention_inputs(heads: Heads, dtype: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any]]:
    """query, key, value; offsets, prompt_of."""
    import torch

    query, key = (_meta(heads.T, count, heads.D, dtype=dtype) for count in (heads.query_heads, heads.key_heads))
    segments = heads.groups * (1 + heads.N)
    integers = (_meta(segments + 1, dtype=torch.int64), _meta(segments, dtype=torch.int64))
    return (query, key, torch.empty_like(key)), integers


def _attention_forward(window: int) -> Callable[[Heads, Any], None]:
    def call(heads: Heads, dtype: Any) -> None:
        from gadcore.kernels.triton import prefix_attention

        tensors, layout = _attention_inputs(heads, dtype)
        prefix_attention.forward(*tensors, *layout, heads.D**-0.5, window, heads.P + heads.R)

    return call


def _attention_backward(window: int) -> Callable[[Heads, Any], None]:
    def call(heads: Heads, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import prefix_attention

        tensors, layout = _attention_inputs(heads, dtype)
        out = _meta(heads.T, heads.query_heads, heads.D, dtype=dtype)
        lse = _meta(heads.T, heads.query_heads, dtype=torch.float32)
        prefix_attention.backward(out, *tensors, out, lse, *layout, heads.D**-0.5, window, heads.P + heads.R)

    return call


def _rotary(quick: bool) -> Iterator[tuple[AotCase, Heads]]:
    """Queries and keys of Llama-3 and of SmolLM2-135M, with cosines in float32, as under autocast."""
    for heads in [Heads(32, 8, 128)] if quick else [Heads(32, 8, 128), Heads(9, 3, 64), Heads(32, 32, 96)]:
        name = f"D={heads.D}, {heads.query_heads} and {heads.key_heads} heads"
        for dtype, back in itertools.product(("bfloat16", "float32"), (False, True)):
            yield AotCase("rotary", "triton", _rotate(back), f"{name}, backward" if back else name, dtype), heads


def _rotate(back: bool) -> Callable[[Heads, Any], None]:
    def call(heads: Heads, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import rotary

        cos = _meta(heads.T, heads.D, dtype=torch.float32)
        for count in (heads.query_heads, heads.key_heads):
            rotary.forward(_meta(heads.T, count, heads.D, dtype=dtype), cos, cos, back)

    return call


def _rows_by_index(quick: bool) -> Iterator[tuple[AotCase, Shape]]:
    """The hidden states that predict response tokens."""
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        yield AotCase("take_rows", "triton", _take_rows, dtype=dtype), Shape(TOKENS[0], WIDTHS[0], VOCABULARIES[0])


def _take_rows(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import take_rows

    take_rows.backward(_meta(shape.T, shape.H, dtype=dtype), _meta(shape.T, dtype=torch.int64), shape.T)


# --- Liger-Kernel's --------------------------------------------------------------------------------------------------


def _liger() -> list[AotCase]:
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
    logits = _meta(rows, SEQUENCE + 1, shape.V, dtype=dtype).requires_grad_()
    ids = _meta(rows, SEQUENCE, dtype=torch.int64)
    ref = _meta(rows, SEQUENCE, dtype=torch.float32)
    advantages = _meta(rows, dtype=torch.float32)
    loss, *_ = GrpoLossFunction.apply(
        logits, None, ref, ids, advantages, None, TEMPERATURE, KL, CLIP, CLIP, True, "dapo"
    )
    loss.backward()


def _liger_log_softmax(shape: Shape, dtype: Any) -> None:
    import torch
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    rows = shape.T // SEQUENCE
    logits = _meta(rows, SEQUENCE + 1, shape.V, dtype=dtype)
    fused_selective_log_softmax(logits, _meta(rows, SEQUENCE, dtype=torch.int64), TEMPERATURE)
