"""docs/kernels.md, wholly generated from the results in bench/results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import record
from bench.record import Result, Timing
from bench.tables_text import ABOUT, FEW_ROWS, HEADER, LEGEND, LIMIT, MEMORY, OPS, not_measured

DOCUMENT = record.ROOT / "docs" / "kernels.md"

Row = dict[str, Any]

# Facts of a run, told once for a file and not in every line of a table.
FACTS = ("suite", "commit", "machine", "versions")


def document(read: Callable[[str], list[Row]] | None = None) -> str:
    """The whole file. read: rows of a suite's results, by default those in bench/results."""
    read = read or (lambda suite: record.read(record.path_of(suite)))
    cpu = [Result.from_json(row) for row in read("kernels")]
    gpu = [Result.from_json(row) for row in read("gpu")]
    sections = [
        ("The ops", [OPS]),
        ("CPU timings", _timings(cpu, "kernels")),
        ("Extra memory", _memory(cpu)),
        ("Two threads over one", _threads(cpu)),
        ("Few-row linear", _few_rows(cpu)),
        ("The test grid", _grid(read("kernel_grid"))),
        ("Ahead-of-time compilation", _plain(read("aot"), "aot", by="op", summary=_targets)),
        ("Traffic", _plain(read("traffic"), "traffic", by="op")),
        ("CUDA sources", _plain(read("cuda"), "cuda")),
        ("GPU timings", _timings(gpu, "gpu")),
        ("What has not been measured", not_measured(cpu, gpu)),
    ]
    parts = [HEADER, *(f"## {title}\n\n" + "\n\n".join(blocks) for title, blocks in sections)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns whose cells are all numbers are set to the right."""
    cells = [list(row) for row in rows]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(header))]
    rule = ["---:" if r else "---" for r in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *cells])


def _numeric(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit() or cell[0] in "-+." or cell.startswith("gate")


def _missing(suite: str) -> list[str]:
    return [f"Not run: there is no `bench/results/{suite}.json`."]


def _provenance(rows: Sequence[Row]) -> str:
    """Where a file's results come from, in a sentence for each different origin."""
    said: list[str] = []
    for row in rows:
        machine, versions = row.get("machine") or {}, row.get("versions") or {}
        facts = [f"commit {row['commit']}"] if row.get("commit") else []
        facts += [f"{key.replace('_', ' ')} {_cell(value)}" for key, value in (machine | versions).items() if value]
        sentence = "Measured at " + ", ".join(facts) + "." if facts else ""
        if sentence and sentence not in said:
            said.append(sentence)
    return "\n\n".join(said)


def _as_rows(results: Sequence[Result]) -> list[Row]:
    return [{"commit": r.commit, "machine": r.machine, "versions": r.versions} for r in results]


# -- the suites kernels and gpu ---------------------------------------------------------------------------------------


def _timings(results: Sequence[Result], suite: str) -> list[str]:
    if not results:
        return _missing(suite)
    blocks = [_provenance(_as_rows(results)), LEGEND]
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
            sizes = [_mib(r.ours.peak_bytes), _mib(r.theirs.peak_bytes), less]
            rows.append([r.op, r.direction, _shape(r.shape), str(r.threads), r.opponent, *sizes])
    if not rows:
        return _missing("kernels") if not results else ["Not measured: this needs Linux and a writable clear_refs."]
    return [MEMORY, table(["op", "direction", "shape", "threads", "beside", "ours MiB", "theirs MiB", "times"], rows)]


def _threads(results: Sequence[Result]) -> list[str]:
    """Ours and every opponent on two threads against one, where both were measured in this run."""
    if not results:
        return _missing("kernels")
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
        return _missing("kernels")
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


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"


# -- suites whose rows are a table as they are ------------------------------------------------------------------------


def _plain(
    rows: Sequence[Row], suite: str, *, by: str | None = None, summary: Callable[[Sequence[Row]], str] | None = None
) -> list[str]:
    """Rows as a table, or as one for each value of the field `by`."""
    if not rows:
        return _missing(suite)
    blocks = [_provenance(rows), ABOUT[suite]] + ([summary(rows)] if summary else [])
    flat = [_flat({key: value for key, value in row.items() if key not in FACTS}) for row in rows]
    if by is None:
        blocks += _compact(flat)
    else:
        for value in dict.fromkeys(row.get(by) for row in flat):
            mine = [{k: v for k, v in row.items() if k != by} for row in flat if row.get(by) == value]
            blocks += [f"### {_cell(value)}", *_compact(mine)]
    return [block for block in blocks if block]


def _targets(rows: Sequence[Row]) -> str:
    """The suite aot in a line for each target of ours and of Liger's."""
    header = ["impl", "target", "pieces of code", "that spill", "largest shared bytes", "failed gates"]
    lines = []
    for impl, target in dict.fromkeys((row["impl"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["impl"], row["target"]) == (impl, target)]
        spilling, shared = sum(row["spill_bytes"] > 0 for row in mine), max(row["shared_bytes"] for row in mine)
        judged = [row["gate"] == "fail" for row in mine if "gate" in row]
        lines.append([impl, target, *map(str, (len(mine), spilling, shared)), str(sum(judged)) if judged else "-"])
    return table(header, sorted(lines, key=lambda line: line[0] != "triton"))


def _compact(rows: Sequence[Row]) -> list[str]:
    """A field with one value in all rows is told once, above the table; one without a value nowhere is not told."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = {name: [_cell(row.get(name)) for row in rows] for name in names}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    same = [name for name, column in cells.items() if len(rows) > 1 and len(set(column)) == 1]
    differing = [name for name in cells if name not in same]
    told = ", ".join(f"{_label(name)} {cells[name][0]}" for name in same)
    body = zip(*(cells[name] for name in differing), strict=True)
    return [f"In all rows: {told}." if told else "", table([_label(name) for name in differing], body)]


def _grid(rows: Sequence[Row]) -> list[str]:
    """Tests and largest errors of every op, implementation and dtype, and how long each process took."""
    if not rows:
        return _missing("kernel_grid")
    seconds: dict[float, list[str]] = {}
    for row in rows:
        impls = seconds.setdefault(row["run_seconds"], [])
        impls += [row["impl"]] * (row["impl"] not in impls)
    took = "; ".join(f"{' and '.join(impls)} in {_cell(s)} s" for s, impls in seconds.items())
    total = f"{sum(row['tests'] for row in rows)} tests: {took}."
    shown = [{k: v for k, v in row.items() if k not in (*FACTS, "run_seconds")} for row in rows]
    return [block for block in [_provenance(rows), ABOUT["kernel_grid"], total, *_compact(shown)] if block]


def _flat(row: Row) -> Row:
    """Nested objects become fields of their own."""
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out.update({f"{key}.{inner}": entry for inner, entry in _flat(value).items()})
        else:
            out[key] = value
    return out


def _label(name: str) -> str:
    return name.replace("_", " ").replace(".", ": ")


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.3g}"
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
