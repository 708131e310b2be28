"""docs/measured/memory.md, from bench/results/memory.json."""

from __future__ import annotations

from pathlib import Path

from bench import record
from bench.memory.suite import STATES
from bench.tables import Read, Row, missing, rows_of

DOCUMENT = record.DOCUMENTS / "memory.md"
GIB = 2**30


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("memory")
    if not rows:
        return "\n\n".join(["# Memory by state", *missing("memory")]) + "\n"
    return "\n".join([*_head(rows), *_states(rows), *_limited(rows)]) + "\n"


def _head(rows: list[Row]) -> list[str]:
    machine = rows[0]["machine"]
    return [
        "# Memory by state",
        "",
        "Made by `python -m bench tables` from bench/results/memory.json, which `python -m bench memory` measures:",
        "SmolLM2-135M as student and as discriminator, fp32, vLLM, the default job's sizes, 1 warmup and 2 GAD steps.",
        "`held` is what the ledger says, `resident` what the kernel says at the end of a state, `peak` the most inside",
        "it (activations, logits, gradients); GiB, of the second GAD step.",
        "",
        f"{machine.get('cpu', '')}, {machine.get('cores', '')} cores, commit {rows[0]['commit']}.",
        "",
    ]


def _states(rows: list[Row]) -> list[str]:
    runs = [row for row in rows if row["op"] == "run"]
    # Of rows that are older than a state nothing is known of it.
    states_of = [state for state in STATES if all(state in row["states"] for row in runs)]
    lines = [
        "| waiting holdings | weights | "
        + " | ".join(f"{state}: held / resident / peak" for state in states_of)
        + " | highest peak | ledger off by | s a step | of it moving | weights to the bit |",
        "| --- | --- |" + " --- |" * (len(states_of) + 5),
    ]
    for row in runs:
        states = [
            " / ".join(f"{row['states'][state][what] / GIB:.2f}" for what in ("held", "resident", "peak"))
            for state in states_of
        ]
        cells = [
            {"none": "stay", "file": "in files"}[row["offload"]],
            "shared" if row["shared_weights"] else "two copies",
            *states,
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['ledger_error']:.1%}",
            f"{row['step_s']:.1f}",
            f"{row['moving_s']:.1f}",
            "same" if row["weights"] == runs[0]["weights"] else "**differ**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _limited(rows: list[Row]) -> list[str]:
    lines = []
    for row in (row for row in rows if row["op"] == "limited run"):
        killed = " (killed by the kernel)" if row["exit_code"] == -9 else ""
        end = "finishes" if row["finished"] else f"ends with exit code {row['exit_code']}{killed}"
        end += f", having said: {row['said']}" if row["said"] else ""
        lines.append(
            f"- Under a control group's limit of {row['limit_bytes'] / GIB:.2f} GiB, memory.offload = "
            f"{row['offload']}: the run {end}."
        )
    return lines
