"""Bytes, launches and FLOPs of the Triton kernels and of Liger-Kernel's for the same work, under the interpreter.

Shapes are production's (T = 4096, H = 3584, V = 151936) divided by SCALE in every direction, and scratch buffers by its
square, so that the parts of the traffic (logits, weight, hidden) and the number of chunks keep their proportions, and
the weight is still larger than an H100's L2. prefix_attention has a group whose lengths are a quarter of a prompt of
1024 and 9 responses of 512; beside it stands the same kernel on rows that each hold a prompt of their own, as
flash-attention wants them, whose minimum is that of the shared prompt. "On production's grid" is linear_logprob
forward again, with T and V and so the programs as they are, and H and L2 divided by the same number; numbers are not
computed there. bt_score has a hidden state larger than L2. All in bfloat16.

A row is one kernel (or aten operator) of an op, summed over its launches; rows named "all" are the whole op. `minimum`
is what the op cannot do without: every byte of its inputs once and of its outputs once. Columns as in
bench.offline.meter, of which `modelled` is a model. Both sides' matrix products outside Triton count with their least,
each operand once. The gate: outputs within the tolerance of PyTorch in float32, and for linear_logprob forward,
prefix_attention forward, bt_score and grpo_ratio_loss no more unique bytes, loads and stores, than LIMIT x the minimum.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.offline.traffic_sizes import Measured, Sizes

LIMIT = 1.15
TOLERANCE = 1e-2
MB = 1e6


def run(quick: bool) -> list[dict[str, Any]]:
    """Rows of the suite, from a process of its own; quick: small shapes. Raises RuntimeError where it fails."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "bench.offline.traffic_suite",
            "--out",
            str(out),
            *(["--quick"] if quick else []),
        ]
        done = subprocess.run(command, cwd=record.ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"the process of the suite traffic ended with {done.returncode}")
        return record.read(out)


def measured(sizes: Sizes) -> list[Measured]:
    """Everything, in this process, which must be one for the interpreter."""
    # First of all: it refuses kernels that were defined before it.
    import bench.offline.interpreter  # noqa: F401  # isort: skip
    from bench.offline.traffic_ops import attention_ops, head_ops, production_grid, score_ops

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
