"""A plan on the terminal: tables, and a bar of memory for every state."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gadcore.memory.holdings import HOLDINGS
from gadcore.plan.against import Comparison
from gadcore.plan.assumptions import RULES, Assumption
from gadcore.plan.memory import Case, StateMemory, host_bytes
from gadcore.plan.planning import Advice, Plan, utilisation
from gadcore.plan.resharding import Resharding

# (what a part of a bar stands for, its character, its colour)
_PARTS = (
    ("parameters, weights", "█", "blue"),
    ("optimizer", "▓", "magenta"),
    ("gradients", "▒", "yellow"),
    ("KV cache", "#", "green"),
    ("working memory", "░", "cyan"),
)
_BAR = 60
# The paper's own case and what it says of its cost.
_PAPER = ("Qwen/Qwen2.5-14B-Instruct", 16, 30.0)
_GIB = 1 << 30


def show(
    console: Console,
    plan: Plan,
    given: Plan,
    assumptions: Sequence[Assumption],
    advice: Sequence[Advice],
    checks: Sequence[str],
) -> None:
    """Everything that `plan` prints. given: the plan under the settings as they are."""
    case = plan.case
    console.print(_heading(case), soft_wrap=True)
    for note in _notes(case, checks):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(_verdict(plan), soft_wrap=True)
    for problem in plan.problems:
        console.print(f"  {problem}", soft_wrap=True)
    if advice:
        console.print(_advice_table(advice))
    console.print(_choice_table(plan, given))
    console.print(_memory_table(plan))
    if case.machine.kind == "cuda":
        console.print(_host(plan))
    console.print(Text("Memory of a rank by state, predicted; | is what a rank may fill"))
    for state, memory in plan.memory.items():
        console.print(_bar(state, memory, case))
    console.print(Text(" ".join(f"{character} {name}" for name, character, _ in _PARTS), style="dim"))
    console.print(_time_table(plan))
    console.print(_hours(plan, given), soft_wrap=True)
    console.print(_assumption_table(assumptions))
    for rule in RULES:
        console.print(f"assumed: {rule}", soft_wrap=True)


def _heading(case: Case) -> str:
    other = "the same" if case.discriminator.name == case.student.name else f"{case.discriminator.name}"
    return (
        f"plan: student {case.student.name} ({case.student.parameters / 1e9:.2f}e9 parameters), discriminator {other} "
        f"({case.discriminator.scalar_parameters / 1e9:.2f}e9); {case.machine.name}, ranks: {case.machine.ranks}. "
        "All figures are predicted."
    )


def _notes(case: Case, checks: Sequence[str]) -> list[str]:
    notes = list(case.machine.notes)
    if case.machine.ranks > 1:
        machine, copies = case.machine, case.config.distributed.replicate
        nodes = f" --nnodes {machine.nodes}" if machine.nodes > 1 else ""
        cut = f"models cut over {case.shards} ranks" + (f", {copies} copies of them" if copies > 1 else "")
        roles = [case.policy, *([case.scorer] if case.has_discriminator else [])]
        if all(role.adapted for role in roles):
            cut = "bases and adapters whole on every rank"
        elif any(role.adapted for role in roles):
            cut += ", that with an adapter whole on each"
        notes.append(
            f"started by torchrun{nodes} --nproc-per-node {machine.per_node} -m gadcore.run .., {cut}; "
            "docs/guide/distributed.md"
        )
    return notes + list(checks)


def _verdict(plan: Plan) -> str:
    usable = plan.case.machine.usable_bytes
    if not plan.fits:
        return "does not fit:"
    left = ", ".join(f"{state} {(usable - memory.total) / 1e9:.1f}" for state, memory in plan.memory.items())
    return f"fits. GB left of {usable / 1e9:.1f} by state (in rollout the KV cache takes what it can use): {left}"


def _choice_table(plan: Plan, given: Plan) -> Table:
    table = Table(title=Text("Settings to use"), box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("setting", "to use", "as given"):
        table.add_column(column)
    case, config = plan.case, plan.case.config
    schedule = config.schedule
    table.add_row("schedule.micro_batch_tokens", str(plan.choice.micro_batch_tokens), str(schedule.micro_batch_tokens))
    asked = schedule.activation_checkpointing
    table.add_row(
        "schedule.activation_checkpointing",
        plan.choice.mode,
        f"auto: {given.choice.mode}" if asked == "auto" else asked,
    )
    if case.engine.holds_memory and case.machine.kind == "cpu":
        table.add_row("rollout.kv_cache_gib", f"{plan.choice.kv_bytes / _GIB:.0f}", str(config.vllm.kv_cache_gib))
    elif case.engine.holds_memory:
        table.add_row(
            "rollout.gpu_memory_utilization",
            f"{utilisation(plan):.2f} (KV cache {plan.choice.kv_bytes / 1e9:.1f} GB)",
            f"{config.vllm.gpu_memory_utilization:.2f} (KV cache {given.choice.kv_bytes / 1e9:.1f} GB)",
        )
        if case.machine.ranks > 1:
            table.add_row("rollout.tensor_parallel", *(str(p.choice.tensor_parallel) for p in (plan, given)))
    table.add_row("memory.offload", case.offload, config.memory.offload)
    fits = "fits" if given.fits else "does not fit"
    table.add_row("", "fits" if plan.fits else "does not fit", fits)
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table(title=Text("GB on a rank, by state"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for state in plan.memory:
        table.add_column(state, justify="right")
    states = list(plan.memory.values())
    names = [name for name in HOLDINGS if any(name in memory.held for memory in states)]
    for name in names:
        table.add_row(name, *(_gb(memory.held.get(name, 0.0)) for memory in states))
    working = list(dict.fromkeys(name for memory in states for name in memory.working))
    for purpose in working:
        table.add_row(Text(purpose, style="dim"), *(_gb(memory.working.get(purpose, 0.0)) for memory in states))
    table.add_section()
    table.add_row("total", *(_gb(memory.total) for memory in states))
    table.add_row("left", *(f"{(plan.case.machine.usable_bytes - memory.total) / 1e9:.2f}" for memory in states))
    return table


def _host(plan: Plan) -> str:
    taken = host_bytes(plan.case, plan.choice)
    return (
        f"page-locked memory of a node's host, predicted: {taken / 1e9:.1f} GB of "
        f"{(taken + plan.host_room) / 1e9:.1f} GB, for what waits there and for masters (student.master)"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else ""


def parts(memory: StateMemory) -> list[float]:
    """Bytes of a state by the parts of a bar."""
    sums = [0.0] * len(_PARTS)
    for name, size in memory.held.items():
        kind = name.rpartition(".")[2]
        sums[{"optimizer": 1, "gradients": 2, "kv_cache": 3}.get(kind, 0)] += size
    sums[-1] = sum(memory.working.values())
    return sums


def _bar(state: str, memory: StateMemory, case: Case) -> Text:
    usable = case.machine.usable_bytes
    # As wide as the longest, discriminator_update.
    bar = Text(f"{state:>20} ")
    width = 0
    ends = 0.0
    for size, (_, character, colour) in zip(parts(memory), _PARTS, strict=True):
        ends += size
        count = min(round(ends / usable * _BAR), 2 * _BAR) - width
        bar.append(character * count, style=colour)
        width += count
    if width <= _BAR:
        bar.append(" " * (_BAR - width) + "|")
    bar.append(f" {memory.total / 1e9:.1f} of {usable / 1e9:.1f} GB", style="" if memory.total <= usable else "red")
    return bar


def _time_table(plan: Plan) -> Table:
    time = plan.time
    table = Table(title=Text("Seconds of a step, and hours of the run"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for stage, steps in time.stages.items():
        table.add_column(f"{stage} ({steps} steps)", justify="right")
    table.add_column("run", justify="right")
    total = max(time.total, 1e-12)
    for phase, seconds in time.phases.items():
        cells = [f"{phases[phase]:.3g}" if phases.get(phase) else "" for phases in time.steps.values()]
        table.add_row(phase, *cells, f"{seconds / 3600:.3g} h {seconds / total:>4.0%}")
    table.add_section()
    table.add_row("total", *(f"{sum(p.values()):.3g}" for p in time.steps.values()), f"{total / 3600:.3g} h")
    return table


def _hours(plan: Plan, given: Plan) -> str:
    line = f"predicted: {_span(plan.time.total)}"
    if given.fits:
        line += f"; {_span(given.time.total)} with the settings as given"
    if (plan.case.student.name, plan.case.machine.ranks) == _PAPER[:2]:
        line += f"; the paper states about {_PAPER[2]:.0f} hours for this model on {_PAPER[1]} H100 (arXiv 2511.10643)"
    return line


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.3g} minutes"


def resharding_table(found: Sequence[Resharding]) -> Table:
    """What a sync moves, by the ranks that share a sampler."""
    title = Text(
        "A sync of the weights, from shards to vLLM's: bytes counted by vLLM's own layout, seconds PREDICTED from the "
        "assumptions node_link, network_link, collective_share, memory_bandwidth and memory_share"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    columns = ("rollout.tensor_parallel", "GB a rank receives", "the least", "by gathering", "from other nodes", "s")
    for column in columns:
        table.add_column(column, justify="right")
    for row in found:
        sizes = (row.received, row.minimum, row.gathered, row.network)
        cells = (f"{size / 1e9:.2f}" for size in sizes)
        table.add_row(str(row.tensor_parallel), *cells, f"{row.seconds:.3f}")
    return table


def _advice_table(advice: Sequence[Advice]) -> Table:
    table = Table(title=Text("What would make it fit"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("change")
    table.add_column("GB left", justify="right")
    table.add_column("")
    table.add_column("cost")
    for item in advice:
        table.add_row(item.change, f"{item.room / 1e9:.1f}", "fits" if item.fits else "not enough", item.cost)
    return table


def _assumption_table(assumptions: Sequence[Assumption]) -> Table:
    table = Table(
        title=Text("Assumptions; change one by --plan.assume NAME=VALUE"), box=box.SIMPLE_HEAD, title_justify="left"
    )
    for column in ("name", "value", "unit", "why"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for item in assumptions:
        value = f"{item.value:.4g}" if item.value >= 1e6 or item.value < 100 else f"{item.value:,.0f}"
        table.add_row(item.name, value, item.unit, item.why)
    return table


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Predicted beside measured."""
    table = Table(title=Text("Predicted beside measured, medians"), box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("stage", "", "predicted", "measured", "predicted / measured"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for item in found:
        scale, unit = (1.0, "s") if item.what == "time" else (1e9, "GB")
        table.add_row(
            item.stage,
            f"{item.what}: {item.name}",
            f"{item.predicted / scale:.3g} {unit}",
            f"{item.measured / scale:.3g} {unit}",
            f"{item.ratio:.2f}",
        )
    return table
