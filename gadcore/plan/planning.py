"""The plan itself: what to use, whether it fits and by how much, how long it takes, and what would make it fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gadcore.config.settings import Config
from gadcore.memory.holdings import State
from gadcore.models.activations import MODES, Mode
from gadcore.plan.memory import (
    ITEM,
    Case,
    Choice,
    StateMemory,
    held,
    host_bytes,
    least_kv,
    needed_kv,
    peak,
    room,
    state_memory,
)
from gadcore.plan.time import RunTime, run_time

_LEAST_BUDGET, _MOST_BUDGET = 1024, 131072
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """A case with the settings to use. room: bytes left in the fullest state; host_room: on a node's host.

    problems: why it does not run, in sentences; empty where it fits.
    """

    case: Case
    choice: Choice
    memory: dict[State, StateMemory]
    time: RunTime
    room: float
    host_room: float
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def fullest(self) -> State:
        return max(self.memory, key=lambda state: self.memory[state].total)


@dataclass(frozen=True)
class Advice:
    """A change of settings or machine, and the room that it leaves: below 0, it is not enough by itself."""

    change: str
    cost: str
    room: float
    fits: bool


def plan_with(case: Case, choice: Choice) -> Plan:
    """What a choice comes to."""
    memory = peak(case, choice)
    left = room(case, memory)
    host = case.machine.figures.get("host_memory_bytes", math.inf) - host_bytes(case, choice)
    problems = []
    if left < 0:
        fullest = max(memory, key=lambda state: memory[state].total)
        problems.append(f"the state {fullest} needs {-left / 1e9:.1f} GB more than a rank has")
    if host < 0:
        problems.append(f"what is moved off needs {-host / 1e9:.0f} GB more than a node's host has")
    least = least_kv(case, choice.tensor_parallel)
    if case.engine.holds_memory and choice.kv_bytes < least:
        problems.append(
            f"the KV cache of {choice.kv_bytes / 1e9:.1f} GB is less than the {least / 1e9:.1f} GB that one group at "
            "full length takes"
        )
    return Plan(case, choice, memory, run_time(case, choice), left, host, tuple(problems))


def make_plan(case: Case) -> Plan:
    """The fastest choice that fits; the one that lacks the least where none does."""
    degree, kv = _sampler(case)
    plans = [
        plan_with(case, Choice(mode, budget, kv, degree)) for mode in _modes(case.config) for budget in _budgets(case)
    ]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (plan.time.total, -plan.choice.micro_batch_tokens))
    return max(plans, key=lambda plan: plan.room)


def as_given(case: Case) -> Plan:
    """What the settings come to as they are: the least recomputation that fits where they leave it open."""
    config, machine = case.config, case.machine
    degree, _ = _sampler(case)
    kv = 0.0
    if case.engine.holds_memory and machine.kind == "cpu":
        kv = float(config.vllm.kv_cache_gib * _GIB)
    elif case.engine.holds_memory:
        weights = case.student.parameters * ITEM[case.sampling_dtype] / degree
        share = config.vllm.gpu_memory_utilization * machine.figures["memory_bytes"]
        kv = max(0.0, share - weights - machine.figures["engine_bytes"])
    plans = [plan_with(case, Choice(mode, config.schedule.micro_batch_tokens, kv, degree)) for mode in _modes(config)]
    return next((plan for plan in plans if plan.fits), plans[-1])


def utilisation(plan: Plan) -> float:
    """rollout.gpu_memory_utilization for the plan's KV cache."""
    rollout, figures = plan.memory["rollout"], plan.case.machine.figures
    weights = rollout.held.get("engine.weights", 0.0)
    return (weights + plan.choice.kv_bytes + figures["engine_bytes"]) / figures["memory_bytes"]


def _modes(config: Config) -> tuple[Mode, ...]:
    chosen = config.schedule.activation_checkpointing
    return MODES if chosen == "auto" else (chosen,)


def _budgets(case: Case) -> list[int]:
    """Powers of two, up to the first that holds a rank's whole batch."""
    tokens = max(case.work.student_tokens, case.work.discriminator_tokens) / case.machine.ranks
    budgets = [_LEAST_BUDGET]
    while budgets[-1] < tokens and budgets[-1] < _MOST_BUDGET:
        budgets.append(2 * budgets[-1])
    return budgets


def _sampler(case: Case) -> tuple[int, float]:
    """(ranks that share a sampler, bytes of KV cache on each): as few ranks as hold weights and one group's cache."""
    degrees = [k for k in (1, 2, 4, 8) if case.machine.per_node % k == 0]
    for degree in degrees:
        beside = state_memory(case, Choice("full", _LEAST_BUDGET, 0.0, degree), "rollout").total
        left = case.machine.usable_bytes - beside
        if left >= least_kv(case, degree) or degree == degrees[-1]:
            kv = min(needed_kv(case, degree), max(left, 0.0))
            if not case.engine.holds_memory:
                kv = 0.0
            elif case.machine.kind == "cpu":
                # The setting counts whole GiB.
                kv = max(1, math.ceil(kv / _GIB)) * float(_GIB)
            return degree, kv
    raise AssertionError("one rank is always a sampler")


def advise(plan: Plan) -> list[Advice]:
    """What would make a plan fit: each change alone, then as few together as do; empty for a plan that fits."""
    if plan.fits:
        return []
    found, changes = [], _changes(plan.case)
    for change in changes:
        changed = make_plan(change(plan.case))
        found.append(Advice(change.name, change.cost, changed.room, changed.fits))
    if not any(item.fits for item in found):
        found += _together(plan.case, changes)
    if plan.case.machine.kind == "cuda":
        found += _more_ranks(plan.case)
    return found


@dataclass(frozen=True)
class _Change:
    """Sets some settings of one section."""

    name: str
    cost: str
    section: str
    values: dict[str, object]

    def __call__(self, case: Case) -> Case:
        section = getattr(case.config, self.section).model_copy(update=self.values)
        config = case.config.model_copy(update={self.section: section})
        limit, work = config.data.max_response_tokens, case.work
        work = replace(work, limit=limit, response=min(work.response, limit), teacher=min(work.teacher, limit))
        return replace(case, config=config, work=work)


def _changes(case: Case) -> list[_Change]:
    """The changes that are open, the ones that cost least first."""
    config, changes = case.config, []
    if case.offload == "none":
        kind = "pinned" if case.machine.kind == "cuda" else "file"
        name, cost = f"memory.offload = {kind}", "copies between states"
        changes.append(_Change(name, cost, "memory", {"offload": kind}))
    if config.schedule.activation_checkpointing != "auto":
        name, cost = "schedule.activation_checkpointing = auto", "layers are computed again"
        changes.append(_Change(name, cost, "schedule", {"activation_checkpointing": "auto"}))
    if config.algorithm.kl_coef > 0:
        name, cost = "algorithm.kl_coef = 0", "no reference policy, no KL term"
        changes.append(_Change(name, cost, "algorithm", {"kl_coef": 0.0}))
    for model in ("student", "discriminator"):
        if getattr(config, model).dtype == "float32":
            name, cost = f"{model}.dtype = bfloat16", "updates below its 8 bits are lost: raise the learning rate"
            changes.append(_Change(name, cost, model, {"dtype": "bfloat16", "autocast": "none"}))
    if config.data.max_response_tokens > 512:
        half = config.data.max_response_tokens // 2
        name, cost = f"data.max_response_tokens = {half}", "more responses are cut"
        changes.append(_Change(name, cost, "data", {"max_response_tokens": half}))
    return changes


def _together(case: Case, changes: list[_Change]) -> list[Advice]:
    """As few of the changes as fit together, the costly ones left out first."""

    def planned(some: list[_Change]) -> Plan:
        changed = case
        for change in some:
            changed = change(changed)
        return make_plan(changed)

    if not planned(changes).fits:
        return []
    kept = changes
    for change in reversed(changes):
        fewer = [other for other in kept if other is not change]
        if planned(fewer).fits:
            kept = fewer
    return [Advice(" and ".join(change.name for change in kept), "all of these", planned(kept).room, True)]


def _more_ranks(case: Case) -> list[Advice]:
    ranks = 2 * case.machine.ranks
    while ranks <= 128:
        plan = make_plan(replace(case, machine=case.machine.with_ranks(ranks)))
        if plan.fits:
            return [Advice(f"{ranks} ranks of the same accelerator", "", plan.room, True)]
        ranks *= 2
    return []


def ledger(plan: Plan) -> list[str]:
    """A line for every state: predicted bytes on a rank, held and working."""
    lines = []
    for state, memory in plan.memory.items():
        parts = [*held(plan.case, plan.choice, state).items(), *memory.working.items()]
        figures = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)
        lines.append(f"memory, predicted, {state}: {memory.total / 1e9:.2f} GB ({figures})")
    return lines
