"""docs/measured/rollout.md, wholly generated from bench/results/rollout.json."""

from __future__ import annotations

from pathlib import Path

from bench import record
from bench.tables import Read, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "rollout.md"

HEADER = """# Sampling alone, measured

Generated from `bench/results/rollout.json` by `python -m bench tables`: do not edit. Made by `python -m bench rollout`.

Sampled tokens per second of wall time: N samples for each of rows / N prompts, P tokens of prompt, R of response,
lengths forced equal, random weights of SmolLM2-135M's shape, fp32. Each side is a process of its own, the sides take
turns, the prefix cache is emptied before every batch as an update of the weights does. Medians over the batches of all
turns; spread is (highest - lowest) / median.

- vllm: stock vLLM with its defaults, compiled. It repacks its linear layers, so it cannot take updated weights.
- vllm eager: the same without compilation.
- hf: transformers' `generate()`, a prompt with its samples at a time."""


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("rollout")
    if not rows:
        return "\n\n".join([HEADER, *missing("rollout")]) + "\n"
    header = ["threads", "rows", "N", "P", "R", "beside", "ours tokens/s", "theirs tokens/s", "ratio", "spread"]
    order = {"vllm": 0, "vllm eager": 1, "hf": 2}
    rows = sorted(rows, key=lambda row: (row["threads"], order[row["opponent"]], row["shape"]["rows"]))
    body = [
        [
            str(row["threads"]),
            *(str(row["shape"][key]) for key in ("rows", "N", "P", "R")),
            row["opponent"],
            *(f"{row[side]['tokens_per_s']:.0f}" for side in ("ours", "theirs")),
            f"{row['ratio']:.2f}",
            f"{row['ours']['spread']:.0%}, {row['theirs']['spread']:.0%}",
        ]
        for row in rows
    ]
    return "\n\n".join([HEADER, provenance(rows), table(header, body)]) + "\n"
