"""docs/measured/trl.md, from bench/results/trl.json."""

from __future__ import annotations

from pathlib import Path

from bench import record
from bench.tables import Read, mib, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "trl.md"
ABOUT = (
    "Made by `python -m bench tables` from bench/results/trl.json, which `python -m bench trl` measures:\n"
    "SmolLM2-135M, fp32, one prompt with 8 samples of full length; log-probabilities of a reference policy, GRPO loss\n"
    "(dapo, beta 0.001) and backward pass. Seconds are of CPU time at one thread, medians of interleaved rounds; the\n"
    "ratio is the median over rounds, above 1 where GADGRPOTrainer is faster. Peak: resident memory above what is\n"
    "there between steps, gradients included. The gate holds loss and gradients of one to those of the other (1e-4)."
)


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = sorted(read("trl"), key=lambda row: row["prompt"])
    if not rows:
        return "\n\n".join(["# gadcore's trainer inside TRL", *missing("trl")]) + "\n"
    header = ["P", "R", "TRL s", "gadcore s", "ratio", "TRL peak MiB", "gadcore peak MiB", "share", "error", "gate"]
    body = []
    for row in rows:
        ours, theirs = row["ours"], row["theirs"]
        peaks = [side["peak_bytes"] for side in (theirs, ours)]
        known = all(peaks)
        body.append(
            [
                str(row["prompt"]),
                str(row["response"]),
                f"{theirs['median_s']:.1f}",
                f"{ours['median_s']:.1f}",
                f"{row['ratio']:.2f}",
                *(mib(peak) if peak else "-" for peak in peaks),
                f"{peaks[1] / peaks[0]:.2f}" if known else "-",
                f"{row['gradient_error']:.0e}",
                row["gate"],
            ]
        )
    loads = ", ".join(f"{row['load']:.0f}" for row in rows)
    busy = f"The machine was shared: load {loads} at the end of the cases."
    blocks = ["# gadcore's trainer inside TRL", ABOUT, provenance(rows), busy, table(header, body)]
    return "\n\n".join(block for block in blocks if block) + "\n"
