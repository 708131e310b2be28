"""docs/measured/kernels.md, wholly generated from the results in bench/results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import record
from bench.gpu import tables as gpu_stages
from bench.kernels.tables_text import (
    CUDA,
    FEW_ROWS,
    GRID,
    HEADER,
    LEGEND,
    LIMIT,
    MEMORY,
    OPS,
    not_measured,
)
from bench.offline import tables as offline
from bench.record import Result, Timing
from bench.tables import FACTS, Read, Row, as_they_are, cell, compact, mib, missing, provenance, rows_of, table

# The widest of a machine's instruction sets names it.
INSTRUCTIONS = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
DOCUMENT = record.DOCUMENTS / "kernels.md"


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    cpu = [Result.from_json(row) for row in read("kernels")]
    staged = read("gpu")
    gpu = [Result.from_json({k: v for k, v in row.items() if k != "stage"}) for row in staged if "op" in row]
    sections = [
        ("The ops", [OPS]),
        *_cpu_sections(cpu),
        ("The test grid", _grid(read("kernel_grid"))),
        *offline.sections(read),
        ("CUDA sources", as_they_are(read("cuda"), "cuda", CUDA)),
        ("A first run on a GPU", gpu_stages.blocks(staged)),
        ("GPU timings", _timings(gpu, "gpu")),
        ("What has not been measured", not_measured(cpu, gpu)),
    ]
    parts = [HEADER, *(f"## {title}\n\n" + "\n\n".join(blocks) for title, blocks in sections)]
    return "\n\n".join(parts) + "\n"


def _cpu_sections(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """By instruction set: the ops choose their products by it, and neither machine speaks for the other."""
    by_set: dict[str, list[Result]] = {}
    for r in results:
        by_set.setdefault(_instructions(r), []).append(r)
    sections = []
    for name, mine in by_set.items() or [("", [])]:
        on = f" on {name}" if name else ""
        sections += [
            (f"CPU timings{on}", _timings(mine, "kernels")),
            (f"Extra memory{on}", _memory(mine)),
            (f"Two threads over one{on}", _threads(mine)),
            (f"Few-row linear{on}", _few_rows(mine)),
        ]
    return sections


def _instructions(r: Result) -> str:
    isa = r.machine.get("isa", [])
    return next((name for flag, name in INSTRUCTIONS.items() if flag in isa), "")


def _as_rows(results: Sequence[Result]) -> list[Row]:
    return [{"commit": r.commit, "machine": r.machine, "versions": r.versions} for r in results]


# -- the suites kernels and gpu ---------------------------------------------------------------------------------------


def _timings(results: Sequence[Result], suite: str) -> list[str]:
    if not results:
        return missing(suite)
    blocks = [provenance(_as_rows(results)), LEGEND]
    heads = [r for r in results if _is_limit(r)]
    if heads:
        header = [
            "op",
            "direction",
            "shape",
            "threads",
            "beside",
            "ours ms",
            "products ms",
            "ours / products",
            "spread",
        ]
        blocks += ["### Beside the limit", LIMIT, table(header, [_limit_row(r) for r in heads])]
    for op in dict.fromkeys(r.op for r in results if r.op != "linear_few_rows"):
        mine = [r for r in results if r.op == op and not _is_limit(r)]
        header = ["direction", "shape", "threads", "beside", "ours ms", "theirs ms", "speed-up", "spread"]
        blocks += [f"### {op}", table([*header, "compile s", "error"], [_timing_row(r) for r in mine])]
    return blocks


def _is_limit(r: Result) -> bool:
    """Bare products have no outputs that could be wrong."""
    return not r.theirs.error


def _limit_row(r: Result) -> list[str]:
    first = [r.op, r.direction, _shape(r.shape), str(r.threads), r.opponent]
    if r.speed_up is None:
        return [*first, "-", "-", "gate FAILED", "-"]
    return [*first, _ms(r.ours), _ms(r.theirs), f"{1 / r.speed_up:.3f}", _spread(r)]


def _timing_row(r: Result) -> list[str]:
    beside = r.opponent + (" (ours with entropy)" if r.config.get("entropy") else "")
    first = [r.direction, _shape(r.shape), str(r.threads), beside]
    error = f"{max([*r.ours.error.values(), *r.theirs.error.values()]):.1e}"
    if r.speed_up is None:
        return [*first, "-", "-", "gate FAILED", "-", "-", error]
    compile_s = "-" if r.theirs.compile_s is None else f"{r.theirs.compile_s:.1f}"
    return [*first, _ms(r.ours), _ms(r.theirs), f"{r.speed_up:.2f}", _spread(r), compile_s, error]


def _spread(r: Result) -> str:
    return f"{r.ours.spread:.0%}, {r.theirs.spread:.0%}"


def _memory(results: Sequence[Result]) -> list[str]:
    """Of the ops with a head, on the fewest threads: the other ops need next to nothing, more threads change little."""
    rows = []
    for r in results:
        if r.op not in ("linear_grpo_loss", "linear_logprob") or r.threads > min(r.threads for r in results):
            continue
        if r.gate == "pass" and r.ours.peak_bytes and r.theirs.peak_bytes:
            less = f"{r.theirs.peak_bytes / r.ours.peak_bytes:.1f}"
            sizes = [mib(r.ours.peak_bytes), mib(r.theirs.peak_bytes), less]
            rows.append([r.op, r.direction, _shape(r.shape), str(r.threads), r.opponent, *sizes])
    if not rows:
        return missing("kernels") if not results else ["Not measured: this needs Linux and a writable clear_refs."]
    return [MEMORY, table(["op", "direction", "shape", "threads", "beside", "ours MiB", "theirs MiB", "times"], rows)]


def _threads(results: Sequence[Result]) -> list[str]:
    """Ours and every opponent on two threads against one, where both were measured in this run."""
    if not results:
        return missing("kernels")
    seconds: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for r in results:
        if r.gate != "pass":
            continue
        copies = r.config.get("weights_in_turn", 1)
        entropy = ", entropy" if r.config.get("entropy") else ""
        key = (r.op, r.direction, _shape(r.shape) + (f", {copies} weights in turn" if copies > 1 else ""))
        seconds.setdefault((*key, f"ours{entropy}"), {}).setdefault(r.threads, r.ours.median_s)
        seconds.setdefault((*key, r.opponent), {}).setdefault(r.threads, r.theirs.median_s)
    rows = [
        [*key, f"{by[1] * 1e3:.3f}", f"{by[2] * 1e3:.3f}", f"{by[1] / by[2]:.2f}"]
        for key, by in seconds.items()
        if {1, 2} <= by.keys()
    ]
    if not rows:
        return ["Not run on two threads."]
    return [table(["op", "direction", "shape", "side", "one thread ms", "two threads ms", "speed-up"], rows)]


def _few_rows(results: Sequence[Result]) -> list[str]:
    """Speed-up over F.linear by M, one line for a weight and a thread count."""
    mine = [r for r in results if r.op == "linear_few_rows"]
    if not mine:
        return missing("kernels")
    counts = sorted({r.shape["M"] for r in mine})
    lines: dict[tuple[int, int, int, int], dict[int, Result]] = {}
    for r in mine:
        key = (r.shape["K"], r.shape["N"], r.config["weights_in_turn"], r.threads)
        lines.setdefault(key, {})[r.shape["M"]] = r
    rows = [[*map(str, key), *(_few_cell(by.get(m)) for m in counts)] for key, by in sorted(lines.items())]
    return [FEW_ROWS, table(["K", "N", "weights in turn", "threads", *(f"M = {m}" for m in counts)], rows)]


def _few_cell(r: Result | None) -> str:
    if r is None:
        return "-"
    if r.speed_up is None:
        return "gate FAILED"
    return f"{r.speed_up:.2f} ({r.ours.median_s * 1e3:.3f}, {r.theirs.median_s * 1e3:.3f})"


def _shape(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def _ms(timing: Timing) -> str:
    ms = timing.median_s * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


# -- suites whose rows are a table as they are ------------------------------------------------------------------------


def _grid(rows: Sequence[Row]) -> list[str]:
    """Tests and largest errors of every op, implementation and dtype, and how long each process took."""
    if not rows:
        return missing("kernel_grid")
    seconds: dict[float, list[str]] = {}
    for row in rows:
        impls = seconds.setdefault(row["run_seconds"], [])
        impls += [row["impl"]] * (row["impl"] not in impls)
    took = "; ".join(f"{' and '.join(impls)} in {cell(s)} s" for s, impls in seconds.items())
    total = f"{sum(row['tests'] for row in rows)} tests: {took}."
    shown = [{k: v for k, v in row.items() if k not in (*FACTS, "run_seconds")} for row in rows]
    return [block for block in [provenance(rows), GRID, total, *compact(shown)] if block]
