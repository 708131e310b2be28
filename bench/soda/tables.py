"""docs/measured/soda.md, from bench/results/soda.json."""

from __future__ import annotations

from pathlib import Path

from bench import record
from bench.tables import Read, mib, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "soda.md"
ABOUT = """Made by `python -m bench tables` from bench/results/soda.json, which `python -m bench soda` measures:
SmolLM2-135M, fp32, loss and gradients of a DPO step on pairs of the teacher's response and a sample, whose reference
log-probs are known. TRL: its DPOTrainer's collator and loss, a padded row for each response of each pair; gadcore:
SODA's packed groups, prompt and teacher's response once. Responses are half to the whole of R tokens long. Tokens are
those of the texts, every prompt and response once, for either side; seconds are of CPU time at one thread, medians of
interleaved rounds; the ratio is the median over rounds, above 1 where gadcore is faster. Errors are those of the
gradient against a literal DPO in fp64, relative; where one of them, or of a loss, is above the tolerance, no speed is
shown."""


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("soda")
    if not rows:
        return "\n\n".join(["# SODA beside TRL's DPOTrainer", ABOUT, *missing("soda")]) + "\n"
    header = ["P", "R", "samples", "prompts", "tokens", "TRL tokens/s", "gadcore tokens/s", "ratio"]
    header += ["TRL peak MiB", "gadcore peak MiB", "TRL error", "gadcore error", "gate"]
    body = []
    for row in rows:
        sides = (row["theirs"], row["ours"])
        passed = row["gate"] == "pass"
        body.append(
            [
                *row["case"].split("x"),
                str(row["tokens"]),
                *(f"{side['tokens_per_second']:.0f}" if passed else "-" for side in sides),
                f"{row['ratio']:.2f}" if passed else "-",
                *(mib(side["peak_bytes"]) if side["peak_bytes"] else "-" for side in sides),
                *(f"{side['gradient_error']:.0e}" for side in sides),
                row["gate"],
            ]
        )
    loads = ", ".join(f"{row['load']:.0f}" for row in rows)
    busy = f"Load of the machine at the end of the cases: {loads}."
    blocks = ["# SODA beside TRL's DPOTrainer", ABOUT, provenance(rows), busy, table(header, body)]
    return "\n\n".join(block for block in blocks if block) + "\n"
