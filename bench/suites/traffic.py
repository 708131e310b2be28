"""Bytes, launches and FLOPs of the Triton kernels and of Liger-Kernel's for the same work, under the interpreter.

Shapes are production's (T = 4096, H = 3584, V = 151936) divided by SCALE in every direction, and scratch buffers by its
square, so that the parts of the traffic (logits, weight, hidden) and the number of chunks keep their proportions, and
the weight is still larger than an H100's L2. prefix_attention has a group whose lengths are a quarter of a prompt of
1024 and 9 responses of 512; beside it stands the same kernel on rows that each hold a prompt of their own, as
flash-attention wants them, whose minimum is that of the shared prompt. "On production's grid" is grouped_logprob
forward again, with T and V and so the programs as they are, and H and L2 divided by the same number; numbers are not
computed there. bt_score has a hidden state larger than L2. All in bfloat16.

A row is one kernel (or aten operator) of an op, summed over its launches; rows named "all" are the whole op. `minimum`
is what the op cannot do without: every byte of its inputs once and of its outputs once. Columns as in
bench.offline.meter, of which `modelled` is a model. Both sides' matrix products outside Triton count with their least,
each operand once. The gate: outputs within the tolerance of PyTorch in float32, and for grouped_logprob forward,
prefix_attention forward, bt_score and grpo_ratio_loss no more unique bytes, loads and stores, than LIMIT x the minimum.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import record

SCALE = 4.3
LIMIT = 1.15
TOLERANCE = 1e-2
TEMPERATURE, CLIP, KL = 1.0, 0.2, 0.001
MB = 1e6

# Programs of a kernel that an H100's SM holds at once, from the suite aot; 1 where not named.
RESIDENT = {
    "_combine_kernel": 16,
    "_rows_kernel": 4,
    "_ratio_kernel": 16,
    "_backward_kernel": 2,
    "_attention_kernel": 1,
    "_d_query_kernel": 1,
    "_d_key_value_kernel": 1,
    "_selective_log_softmax_kernel": 25,
    "_grpo_loss_fwd_kernel": 25,
    "_grpo_loss_bwd_kernel": 4,
}


def run(quick: bool) -> list[dict[str, Any]]:
    """Rows of the suite, from a process of its own; quick: small shapes. Raises RuntimeError where it fails."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.suites.traffic", "--out", str(out), *(["--quick"] if quick else [])]
        done = subprocess.run(command, cwd=record.ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"the process of the suite traffic ended with {done.returncode}")
        return record.read(out)


@dataclass(frozen=True)
class Sizes:
    """T, H, V of the head; rows: sequences of the GRPO loss; bt_*, group: of bt_score, group with its teacher.

    attention: tokens of the prompt and of a response, query heads, key heads, head size; `group` responses.
    """

    T: int
    H: int
    V: int
    rows: int
    bt_tokens: int
    bt_width: int
    bt_groups: int
    group: int
    cache_bytes: int
    attention: tuple[int, int, int, int, int]
    grid: tuple[int, int, int, int]  # T, H, V, and bytes of L2, of the op that runs on production's grid

    @classmethod
    def of(cls, quick: bool) -> Sizes:
        if quick:
            return cls(256, 128, 5440, 2, 512, 256, 4, 9, 1 << 20, (48, 24, 4, 2, 64), (256, 128, 10880, 128 << 10))
        return cls(
            1024,
            832,
            35264,
            4,
            8192,
            3584,
            16,
            9,
            50 << 20,
            (256, 128, 8, 2, 128),
            (4096, 256, 151936, (50 << 20) // 14),
        )


@dataclass(frozen=True)
class Measured:
    """One op of one side. minimum: bytes. error: relative, of the worst output; None for what is not compared."""

    op: str
    impl: str
    shape: str
    minimum: int
    rows: list[Any]
    error: float | None
    limited: bool


def measured(sizes: Sizes) -> list[Measured]:
    """Everything, in this process, which must be one for the interpreter."""
    # First of all: it refuses kernels that were defined before it.
    import bench.offline.interpreter  # noqa: F401  # isort: skip
    from bench.suites.traffic_ops import attention_ops, head_ops, production_grid, score_ops

    return [*head_ops(sizes), *production_grid(sizes), *attention_ops(sizes), *score_ops(sizes)]


def table(results: Sequence[Measured]) -> list[dict[str, Any]]:
    ours = {result.op: _sum("all", result.rows) for result in results if result.impl == "triton"}
    out = []
    for result in results:
        total = _sum("all", result.rows)
        kernels: dict[str, list[Any]] = {}
        for row in result.rows:
            kernels.setdefault(row.kernel, []).append(row)
        over = (total["unique_MB"] * MB / result.minimum, total["modelled_MB"] * MB / result.minimum)
        facts = {"op": result.op, "impl": result.impl, "shape": result.shape, "dtype": "bfloat16"}
        whole = {
            **facts,
            **total,
            "minimum_MB": result.minimum / MB,
            "unique_over_minimum": over[0],
            "modelled_over_minimum": over[1],
            "error": result.error,
        }
        if result.impl == "triton":
            right = result.error is None or result.error <= TOLERANCE
            within = right and (not result.limited or over[0] <= LIMIT)
            whole["limit"] = LIMIT if result.limited else None
            whole["gate"] = "pass" if within else "fail"
        else:
            whole["unique_over_ours"] = total["unique_MB"] / ours[result.op]["unique_MB"]
            whole["modelled_over_ours"] = total["modelled_MB"] / ours[result.op]["modelled_MB"]
        out += [whole, *({**facts, **_sum(name, rows)} for name, rows in kernels.items())]
    return out


def _sum(kernel: str, rows: Sequence[Any]) -> dict[str, Any]:
    def total(*names: str) -> float:
        return sum(getattr(row, name) for row in rows for name in names) / MB

    return {
        "kernel": kernel,
        "launches": len(rows),
        "programs": max(row.programs for row in rows),
        "requested_MB": total("requested_load", "requested_store"),
        "sectors_MB": total("sector_load", "sector_store"),
        "loaded_MB": total("unique_load"),
        "stored_MB": total("unique_store"),
        "unique_MB": total("unique"),
        "modelled_MB": total("modelled"),
        "GFLOP": total("flops") / 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process: rows to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    record.write(options.out, table(measured(Sizes.of(options.quick))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
