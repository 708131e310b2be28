"""docs/measured/reshard.md, from bench/results/reshard.json."""

from __future__ import annotations

from pathlib import Path

from bench import record
from bench.tables import Read, Row, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "reshard.md"
_HEADER = (
    "trainer", "tensor parallel", "engine, GB a rank", "received, GB", "the least, GB", "by gathering, GB",
    "from other nodes, GB", "exchanges", "s to plan", "predicted s a sync",
)  # fmt: skip


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("reshard")
    head = ["# From the trainer's shards to the sampler's"]
    if not rows:
        return "\n\n".join([*head, *missing("reshard")]) + "\n"
    blocks = [*head, _about(rows), provenance(rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        blocks += _of_model(model, [row for row in rows if row["model"] == model])
    return "\n\n".join(blocks) + "\n"


def _about(rows: list[Row]) -> str:
    planned = [row for row in rows if "refused" not in row]
    right = sum(row["gate"] == "pass" for row in planned)
    return f"""\
Made by `python -m bench tables` from bench/results/reshard.json, which `python -m bench reshard` makes: plans of a sync
from fp32 weights under FSDP2 to bf16 weights of vLLM with tensor parallelism, for models of the published sizes on the
meta device. The layouts are vLLM's own: its models are made for every rank and their loaders watched. 2 x 8 is a copy
of the shards on each of two nodes (HSDP): nothing crosses between them then.

In {right} of {len(planned)} plans every element of every engine is written exactly once, from the rank that has it, and
what a rank receives is the least that is possible: its engine's part without the rows that it has itself. Bytes are of
the rank that receives the most; `by gathering` is what it would receive if all ranks gathered the model, as is usual.
`s to plan` are a core's seconds here, once a run, without those in which vLLM's models are made.

**Seconds of a sync are a prediction** from an H100's data sheet and the assumptions that `plan` prints (NVLink 450 GB/s
and 400 Gb/s of network a GPU, three quarters of them reached), with casts, packing and the fingerprint, nothing
overlapped, 8 GPUs a node. Nothing of it has been measured on a GPU. What others publish of their own: NeMo-RL 0.21 to
0.34 s for Qwen3-4B from 8 data-parallel ranks to 8 of tensor parallelism; verl 3.9 to 6.0 s for a 7B between nodes."""


def _of_model(model: str, rows: list[Row]) -> list[str]:
    first = next((row for row in rows if "refused" not in row), None)
    size = "" if first is None else f", {first['parameters'] / 1e9:.2f}e9 parameters"
    size += ", tied" if first is not None and first["tied"] else ""
    cells = []
    for row in sorted(rows, key=lambda row: (row["replicas"], row["ranks"], row["tensor_parallel"])):
        trainer = (
            f"{row['ranks']}" if row["replicas"] == 1 else f"{row['replicas']} x {row['ranks'] // row['replicas']}"
        )
        if "refused" in row:
            cells.append([trainer, str(row["tensor_parallel"]), f"vLLM refuses: {row['refused']}", *[""] * 7])
            continue
        numbers = (row[name] / 1e9 for name in ("engine", "received", "minimum", "gathered", "network"))
        cells.append(
            [
                trainer,
                str(row["tensor_parallel"]),
                *(f"{number:.2f}" for number in numbers),
                str(row["buckets"]),
                f"{row['plan_s']:.2f}",
                f"{row['predicted_s']:.3f}",
            ]
        )
    return [f"## {model}{size}", table(_HEADER, cells)]
