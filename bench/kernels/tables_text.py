"""The sentences of docs/measured/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence

from bench.record import Result
from gadcore.kernels import ops

HEADER = """# The kernels, measured

Generated from `bench/results/*.json` by `python -m bench tables`: do not edit. Results are made by
`python -m bench kernels`, `traffic` and `aot`, by the test grid (`kernel_grid`), by the build of the CUDA sources
(`cuda`), and by `make gpu-bench` (`gpu`)."""


def _row(op: str) -> str:
    of = ops.OPS[op]
    has = ("yes" if there else "no" for there in (of.triton, of.cpu, of.cuda))
    return f"| `{ops.module_of(op)}.{op}` | {of.computes} | {' | '.join(has)} |"


OPS = "\n".join(
    [
        "| function | computes | Triton | C++ | CUDA C++ |",
        "| --- | --- | --- | --- | --- |",
        *map(_row, ops.OPS),
        "",
        "Each but `gated_mlp` has a PyTorch reference beside it, which computes wherever the others cannot. The",
        "equations stand in the modules.",
    ]
)

LEGEND = """Both sides of a line ran in one process, in turn, on the same inputs; the order changes every round. Times
are medians over the rounds. The speed-up is the median over the rounds of theirs over ours: above 1, ours is faster. It
is shown only where all outputs of both sides (loss or log-probability, gradients) were within the tolerance of fp64 in
this very run; `error` is the largest relative L2 error of either side. `spread` is (max - min) / median of ours, then
of theirs. Compile time is in no other column."""

LIMIT = """The matrix products alone, into memory that is there already: no implementation, but what none can do
without. Where the backward pass of `linear_logprob` computes the logits again, it needs a fourth one."""

MEMORY = """Peak of the resident memory during a call above the level before it, the gradients included (of the weight
alone: V x H numbers). The last column is theirs over ours."""

FEW_ROWS = """Speed-up over `F.linear`, and the milliseconds of ours and of `F.linear`. Weights in turn: that many
weights of the shape are used one after the other, as the layers of a model are in decoding, so that none stays in a
cache; 1 is the same weight every time."""

GRID = """Every implementation against float64, forward and every gradient. An error is the largest absolute
difference over the largest absolute value of the truth (over 1 at least for results); below is the largest of all
tests. The Triton kernels ran under Triton's interpreter on the CPU."""

CUDA = "What ptxas says that the kernels of `csrc/cuda` take on each target; spills and shared memory in bytes."


def not_measured(cpu: Sequence[Result], gpu: Sequence[Result]) -> list[str]:
    """What a reader might look for above and will not find."""
    items = []
    if not gpu:
        items += [
            "**Any time on a GPU.** No machine that these results come from has one, so no GPU speed-up is claimed."
            " Missing are the times of the Triton kernels of `linear_logprob`, `linear_grpo_loss`, `grpo_ratio_loss`"
            " and `bt_score` on sm_80, sm_90 and sm_100, those of their opponents there (PyTorch, torch.compile,"
            " cut-cross-entropy, TRL, Liger-Kernel), and with them the bandwidth and the share of the tensor cores that"
            " are reached. `make gpu-bench` measures them where there is a GPU; elsewhere it says that it was skipped.",
            "**The tests on a GPU** (`make gpu-test`): not run. What stands in for them are the sections above on the"
            " test grid, ahead-of-time compilation, traffic and the CUDA sources.",
            "**Autotuning**: which configuration is the fastest shows on a GPU only.",
        ]
    isa = {name for r in cpu for name in r.machine.get("isa", [])}
    if "avx512f" not in isa:
        items.append("**AVX-512 and AMX**: the machine of the CPU timings has neither.")
    if cpu:
        threads = max(r.threads for r in cpu)
        items.append(f"**More than {threads} threads**, several CPU sockets, and CPU timings in bfloat16 or float16.")
    return ["\n".join(f"- {item}" for item in items)]
