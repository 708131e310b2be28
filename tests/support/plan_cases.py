"""Cases for the planner: presets on machines, and one of round numbers."""

from __future__ import annotations

from gadcore.config import loading
from gadcore.config.settings import Config
from gadcore.plan.assumptions import Assumption, Assumptions
from gadcore.plan.command import build_case
from gadcore.plan.dimensions import Dimensions
from gadcore.plan.machine import DECODE_ROWS, Machine
from gadcore.plan.memory import Case
from gadcore.plan.settings import PlanSettings
from gadcore.plan.workload import Workload


def preset_case(preset: str, machine: str, *arguments: str) -> Case:
    """A preset on a machine; arguments: as on the command line of training."""
    config = loading.load(["--preset", preset, *arguments])
    return build_case(config, PlanSettings(machine=machine), 1)[0]


def round_case(*, kind: str = "cpu", ranks: int = 1, config: Config | None = None, **figures: float) -> Case:
    """2 layers of 1000 matrix entries, hidden 10, vocabulary 100; every rate 1e6, every share 1 or 0.5."""
    d = Dimensions("round", "", 10, 2, 1, 10, 5, 20, 100, True, 3200, 3210, 1000, 1100)
    rates = {"product_flops_float32": 1e6, "product_flops_bfloat16": 1e6, "memory_bandwidth": 1e6, "file_write": 1e6}
    rates |= {f"decode_flops_{rows}": 1e6 for rows in DECODE_ROWS} | {"decode_bandwidth": 1e6, "file_read": 1e6}
    rates |= {"host_link": 1e6, "node_link": 1e6, "network_link": 1e5}
    shares = dict.fromkeys(("product_share", "memory_share", "overlap_share", "collective_share"), 1.0)
    shares |= dict.fromkeys(("head_share", "attention_share", "elementwise_share", "decode_flops_share"), 0.5)
    others = {"engine_step_seconds": 0.5, "engine_layer_seconds": 0.25, "engine_row_seconds": 0.0}
    sizes = {"memory_bytes": 1e9, "reserve_share": 0.1, "process_bytes": 1e3, "engine_bytes": 1e3}
    sizes |= {"logits_bytes": 2 << 30, "optimizer_passes": 10}
    if kind == "cuda":
        del rates["decode_bandwidth"]
        others |= {"engine_graph_rows": 4.0, "engine_graph_bytes": 500.0, "duplex_share": 0.5}
    known = rates | shares | others | sizes | {"host_memory_bytes": 1e9} | figures
    items = Assumptions([Assumption(name, value, "", "test") for name, value in known.items()])
    work = Workload(
        prompts=2, samples=4, prompt=10.0, response=6.0, teacher=5.0, limit=8, longest_prompt=16,
        steps={"warmup": 3, "gad": 5}, eval_rows=0,
    )  # fmt: skip
    machine = Machine("round", kind, 1, ranks, items)  # type: ignore[arg-type]
    return Case(config or Config(), d, d, machine, work)
