"""Machines: how many accelerators, and the figures that memory and time are predicted from."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gadcore.errors import UserError
from gadcore.plan.assumptions import Assumption, Assumptions

H100 = re.compile(r"(?:(?P<nodes>[1-9]\d?)x(?P<per_node>[1-8])-)?h100-80gb(?:-x(?P<count>[1-8]))?")
# One GPU of a workstation: the figures that differ from an H100's. Memory: 23.65 GiB, as torch finds them.
RTX4090 = "rtx4090-24gb"
_RTX4090 = {
    "memory_bytes": 25.39e9,
    "host_memory_bytes": 64e9,
    "product_flops_bfloat16": 165e12,
    "product_flops_float32": 82.6e12,
    "memory_bandwidth": 1.008e12,
    "host_link": 25e9,
}
_LOGITS = "what the output head's kernels hold at a time (kernels/triton/linear_grpo_loss.py)"
_PASSES = "over parameters: AdamW reads four and writes three, clipping reads two and writes one"
# Rows of a decoding step that a CPU's rate is measured at: it depends on them.
DECODE_ROWS = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """kind: "cuda" or "cpu", which counts as one accelerator. figures: per accelerator but where they say so.

    limit: bytes of an accelerator that a run may take, where somebody has said so.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    nodes: int
    per_node: int
    figures: Assumptions
    notes: tuple[str, ...] = ()
    limit: float | None = None

    @property
    def ranks(self) -> int:
        """Processes of a run: one an accelerator."""
        return self.nodes * self.per_node

    @property
    def usable_bytes(self) -> float:
        """Memory of an accelerator that a plan may fill."""
        if self.limit is not None:
            return self.limit
        return self.figures["memory_bytes"] * (1 - self.figures["reserve_share"])

    def product_flops(self, dtype: str) -> float:
        """FLOP/s of large products of one accelerator in "float32" or "bfloat16", before any share is taken."""
        return self.figures[f"product_flops_{dtype}"]

    def decode_flops(self, rows: float, dtype: str) -> float:
        """FLOP/s of the products of a decoding step of `rows` sequences, where memory does not limit them."""
        if self.kind == "cuda":
            return self.product_flops(dtype) * self.figures["decode_flops_share"]
        return self.figures[f"decode_flops_{min(DECODE_ROWS, key=lambda at: abs(at - rows))}"]

    def with_ranks(self, ranks: int, per_node: int | None = None) -> Machine:
        """The same accelerators; per_node: default as many, up to 8, as leave every node with as many."""
        per_node = per_node or max(k for k in range(1, 9) if ranks % k == 0)
        name, figures = f"{ranks} of {self.name}", self.figures
        if self.kind == "cpu":
            # The processes of a node share what one alone has.
            name = f"{self.name}, {ranks} processes"
            share = figures["memory_bytes"] / per_node
            figures = figures.replaced({"memory_bytes": share}, f"of {figures['memory_bytes'] / 1e9:.1f} GB")
        limit = None if self.limit is None else self.limit / (per_node if self.kind == "cpu" else 1)
        return replace(self, name=name, nodes=ranks // per_node, per_node=per_node, figures=figures, limit=limit)


def h100(nodes: int, per_node: int, name: str) -> Machine:
    """Nodes of H100 SXM 80 GB."""
    vendor, guess = "NVIDIA's data sheet (H100 SXM)", "assumed, not measured here"
    figures = [
        Assumption("memory_bytes", 80e9, "bytes", "by name; drivers report a little more"),
        Assumption("reserve_share", 0.05, "share", f"{guess}: left free for fragmentation"),
        Assumption("process_bytes", 1.5e9, "bytes", f"{guess}: CUDA context and communication buffers"),
        Assumption("engine_bytes", 3e9, "bytes", f"{guess}: what vLLM takes beside weights and KV cache"),
        Assumption("logits_bytes", 2 << 30, "bytes", _LOGITS),
        Assumption("engine_graph_bytes", 1e9, "bytes", f"{guess}: vLLM's CUDA graphs"),
        Assumption("host_memory_bytes", 2e12, "bytes", "per node, as in a DGX H100"),
        Assumption("product_flops_bfloat16", 989e12, "FLOP/s", f"{vendor}, dense"),
        Assumption("product_flops_float32", 67e12, "FLOP/s", f"{vendor}, without TF32"),
        Assumption("product_share", 0.6, "share", f"{guess}: of the peak, large products"),
        Assumption("head_share", 0.5, "share", f"{guess}: of the peak, output head with its softmax"),
        Assumption("attention_share", 0.35, "share", f"{guess}: of the peak, packed attention"),
        Assumption("elementwise_share", 0.25, "share", f"{guess}: of the layers' time, norms, activations, casts"),
        Assumption("memory_bandwidth", 3.35e12, "bytes/s", vendor),
        Assumption("optimizer_passes", 10, "passes", _PASSES),
        Assumption("memory_share", 0.8, "share", f"{guess}: of the bandwidth, optimizer and decoding"),
        Assumption("decode_flops_share", 0.5, "share", f"{guess}: of the peak, products of a decoding step"),
        Assumption("engine_step_seconds", 3e-3, "s", f"{guess}: vLLM's scheduling and sampling, per decoding step"),
        Assumption("engine_layer_seconds", 2.5e-4, "s", f"{guess}: launches of a layer without CUDA graphs"),
        Assumption("engine_graph_rows", 512, "sequences", "vLLM 0.32 captures graphs of decoding steps up to this"),
        Assumption("host_link", 55e9, "bytes/s", "PCIe Gen5 x16, page-locked memory, one way"),
        Assumption("duplex_share", 0.75, "share", f"{guess}: of that link, each way while both are in use"),
        Assumption("node_link", 450e9, "bytes/s", f"{vendor}: NVLink, one way"),
        Assumption("network_link", 50e9, "bytes/s", "400 Gb/s InfiniBand per accelerator"),
        Assumption("collective_share", 0.75, "share", f"{guess}: of the links, gathering and reducing"),
        Assumption("overlap_share", 0.8, "share", f"{guess}: of the computing time, that hides communication"),
        Assumption("file_write", 2e9, "bytes/s", f"{guess}: per node, checkpoints and files"),
        Assumption("file_read", 5e9, "bytes/s", f"{guess}: per node, files"),
    ]
    return Machine(name, "cuda", nodes, per_node, Assumptions(figures))


def cpu(name: str, memory_bytes: float) -> Machine:
    """A CPU, of whose rates one AVX2 core's are assumed: gadcore.plan.calibrate measures others."""
    guess = "assumed of one AVX2 core; --calibrate measures it"
    fixed = "seen with vLLM 0.32 on an AVX2 core"
    figures = [
        Assumption("memory_bytes", memory_bytes, "bytes", "what the operating system reports"),
        Assumption("reserve_share", 0.1, "share", "assumed: left to the operating system and others"),
        Assumption("process_bytes", 0.7e9, "bytes", "resident size of a process with torch, transformers and vLLM"),
        Assumption("engine_bytes", 0.2e9, "bytes", "assumed: logits and buffers of vLLM while it samples"),
        Assumption("product_flops_float32", 85e9, "FLOP/s", guess),
        Assumption("product_flops_bfloat16", 8e9, "FLOP/s", "assumed: no matrix instructions for bfloat16"),
        Assumption("product_share", 1.0, "share", "the product rate is a measured one"),
        Assumption("head_share", 0.85, "share", guess),
        Assumption("attention_share", 0.4, "share", "assumed: of the product rate, packed attention"),
        Assumption("elementwise_share", 0.12, "share", guess),
        Assumption("memory_bandwidth", 17e9, "bytes/s", guess),
        Assumption("memory_share", 1.0, "share", "the bandwidth is a measured one"),
        Assumption("optimizer_passes", 10, "passes", _PASSES),
        Assumption("decode_bandwidth", 13e9, "bytes/s", guess),
        *(
            Assumption(f"decode_flops_{rows}", rate, "FLOP/s", guess)
            for rows, rate in zip(DECODE_ROWS, (7e9, 55e9, 60e9, 76e9, 79e9), strict=True)
        ),
        Assumption("engine_step_seconds", 8e-3, "s", f"{fixed}: scheduling, per decoding step"),
        Assumption("engine_layer_seconds", 5e-4, "s", f"{fixed}: one layer beside its products"),
        Assumption("engine_row_seconds", 5e-4, "s", f"{fixed}: sampling of one sequence's token"),
        Assumption("node_link", 2e9, "bytes/s", "assumed: gloo between processes of a node, one way"),
        Assumption("network_link", 1e9, "bytes/s", "assumed: gloo over 10 Gb/s Ethernet"),
        Assumption("collective_share", 1.0, "share", "the links are assumed as they are"),
        Assumption("overlap_share", 0.01, "share", "assumed: a CPU that communicates computes little meanwhile"),
        Assumption("file_write", 0.4e9, "bytes/s", guess),
        Assumption("file_read", 1e9, "bytes/s", guess),
    ]
    return Machine(name, "cpu", 1, 1, Assumptions(figures))


def here(threads: int, kind: str | None = None) -> Machine:
    """This machine's GPU or CPU, with the figures of its calibration where there are some.

    kind: "cuda" or "cpu"; default the GPU where there is one.
    """
    # Imported only here: a plan for another machine needs neither.
    import psutil
    import torch

    from gadcore.memory.resident import memory_limit
    from gadcore.plan.calibration import device_name, read

    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    measured, date = read(threads, kind)
    plural = "s" if threads > 1 else ""
    notes: list[str] = []
    if kind == "cuda":
        machine = h100(1, 1, f"this machine: {device_name(kind)}")
        reported = {
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "host_memory_bytes": psutil.virtual_memory().total,
        }
        machine = replace(machine, figures=machine.figures.replaced(reported, "what the driver reports"))
        if "H100" not in machine.name:
            notes.append("rates that were not measured here are an H100's: seconds of another GPU are not predicted")
    else:
        machine = cpu(f"this machine: {device_name(kind)}, {threads} thread{plural}", memory_limit())
    # Another version of gadcore may have kept figures of other names.
    known = {key: value for key, value in measured.items() if key in machine.figures}
    if known:
        machine = replace(machine, figures=machine.figures.replaced(known, f"measured on {date}"))
    else:
        notes.append(f"not calibrated for {threads} thread{plural}: `plan --calibrate` measures this machine")
    return replace(machine, notes=tuple(notes))


def from_file(path: Path) -> Machine:
    """A machine of a TOML file: base, nodes, accelerators (per node) and any figure by name.

    Raises UserError for a file that cannot be read, or a key or value that is not known.
    """
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"plan.machine = {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"plan.machine = {path} is not valid TOML: {error}") from None
    base, name = table.pop("base", "h100-80gb"), str(table.pop("name", path.stem))
    counts = {key: table.pop(key, 1) for key in ("nodes", "accelerators")}
    for key, count in counts.items():
        if type(count) is not int or count < 1:
            raise UserError(f"{key} = {count!r} ({path}) must be a whole number from 1")
    for key, value in table.items():
        if type(value) not in (int, float) or value <= 0:
            raise UserError(f"{key} = {value!r} ({path}) must be a number above 0")
    if base == "cpu":
        machine = cpu(name, 16e9)
    elif base == "h100-80gb":
        machine = h100(counts["nodes"], counts["accelerators"], name)
    else:
        raise UserError(f'base = {base!r} ({path}) is unknown: use "h100-80gb" or "cpu"')
    return replace(machine, figures=machine.figures.replaced(table, str(path)))


def find(name: str, threads: int, assume: Mapping[str, float] | None = None, *, kind: str | None = None) -> Machine:
    """The machine that plan.machine names. assume: other values for its figures. kind: what of this machine, as here().

    Raises UserError for a name that is none.
    """
    machine = here(threads, kind) if name == "here" else _named(name)
    return replace(machine, figures=machine.figures.replaced(assume or {}, "plan.assume"))


def _named(name: str) -> Machine:
    if (path := Path(name)).suffix == ".toml":
        return from_file(path)
    if name == RTX4090:
        machine = h100(1, 1, name)
        return replace(machine, figures=machine.figures.replaced(_RTX4090, "NVIDIA's data sheet; host memory assumed"))
    match = H100.fullmatch(name)
    if match is None or (match["nodes"] and match["count"]):
        raise UserError(
            f"plan.machine = {name} is unknown: use here, h100-80gb-x1 to -x8, 2x8-h100-80gb (nodes x accelerators), "
            f"{RTX4090}, or a TOML file"
        )
    if match["nodes"]:
        return h100(int(match["nodes"]), int(match["per_node"]), name)
    return h100(1, int(match["count"] or 1), name)
