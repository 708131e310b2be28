"""The plan itself: what to use, whether it fits and by how much, how long it takes, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from gadcore.config.settings import Config
from gadcore.errors import UserError
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
    # Of a group whose samples do not all fit, some wait; an engine that cannot hold one does not start.
    least = _sequence(case, choice.tensor_parallel)
    if case.engine.holds_memory and choice.kv_bytes < least:
        problems.append(
            f"the KV cache of {choice.kv_bytes / 1e9:.2f} GB is less than the {least / 1e9:.2f} GB that one sequence "
            "of full length takes"
        )
    return Plan(case, choice, memory, run_time(case, choice), left, host, tuple(problems))


def _sequence(case: Case, tensor_parallel: int) -> float:
    """Bytes of KV cache, on a rank, for a sequence of full length."""
    return case.context_tokens * case.student.kv_bytes(ITEM[case.sampling_dtype]) / tensor_parallel


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


def as_given(case: Case, *, sequence_fits: bool = False) -> Plan:
    """What the settings come to as they are: the least recomputation that fits where they leave it open.

    sequence_fits: the sampler's cache holds one sequence of full length, whatever its share of the memory comes to.
    """
    config, machine = case.config, case.machine
    degree = config.vllm.tensor_parallel if case.engine.holds_memory and machine.ranks > 1 else 1
    if machine.ranks % degree:
        raise UserError(
            f"rollout.tensor_parallel = {degree} does not divide the {machine.ranks} ranks of {machine.name}: take a "
            "number of ranks that does, inside a node"
        )
    kv = 0.0
    if case.engine.holds_memory and machine.kind == "cpu":
        kv = float(config.vllm.kv_cache_gib * _GIB)
    elif case.engine.holds_memory:
        weights = case.student.parameters * ITEM[case.sampling_dtype] / degree
        share = config.vllm.gpu_memory_utilization * machine.figures["memory_bytes"]
        kv = max(_sequence(case, degree) if sequence_fits else 0.0, share - weights - case.sampler_bytes)
    plans = [plan_with(case, Choice(mode, config.schedule.micro_batch_tokens, kv, degree)) for mode in _modes(config)]
    return next((plan for plan in plans if plan.fits), plans[-1])


def nearest_that_fits(case: Case, given: Plan, lowered: Collection[str]) -> Plan | None:
    """The fastest plan that fits with the settings as they are, but for `lowered`, of which it may take less.

    lowered: of schedule.micro_batch_tokens and rollout.gpu_memory_utilization. given: as_given(case). None: none fits.
    """
    budgets, caches = [given.choice.micro_batch_tokens], [given.choice.kv_bytes]
    while "schedule.micro_batch_tokens" in lowered and budgets[-1] // 2 >= _LEAST_BUDGET:
        budgets.append(budgets[-1] // 2)
    if "rollout.gpu_memory_utilization" in lowered and case.machine.kind == "cuda":
        caches.append(_sampler(case)[1])
    plans = [
        plan_with(case, replace(given.choice, mode=mode, micro_batch_tokens=budget, kv_bytes=kv))
        for budget in budgets
        for kv in caches
        for mode in _modes(case.config)
    ]
    return min((plan for plan in plans if plan.fits), key=lambda plan: plan.time.total, default=None)


def utilisation(plan: Plan) -> float:
    """rollout.gpu_memory_utilization for the plan's KV cache."""
    rollout, figures = plan.memory["rollout"], plan.case.machine.figures
    weights = rollout.held.get("engine.weights", 0.0)
    return (weights + plan.choice.kv_bytes + plan.case.sampler_bytes) / figures["memory_bytes"]


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
    degrees = [1] if case.policy.adapted else [k for k in (1, 2, 4, 8) if case.machine.per_node % k == 0]
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


def advise(plan: Plan, *, ranks: bool = True) -> list[Advice]:
    """What would make a plan fit: each change alone, then as few together as do; empty for a plan that fits.

    ranks: more of the same accelerators as well.
    """
    if plan.fits:
        return []
    found, changes = [], _changes(plan.case)
    for change in changes:
        changed = make_plan(change(plan.case))
        found.append(Advice(change.name, change.cost, changed.room, changed.fits))
    if not any(item.fits for item in found):
        found += _together(plan.case, changes)
    if ranks and plan.case.machine.kind == "cuda":
        found += _more_ranks(plan.case)
    return found


@dataclass(frozen=True)
class _Change:
    """Sets some settings: {"section.key": value}. also: what has to be set with them, and goes without saying."""

    values: Mapping[str, object]
    cost: str
    also: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = {key: f"{value:g}" if isinstance(value, float) else value for key, value in self.values.items()}
        return " and ".join(f"{key} = {value}" for key, value in told.items())

    def __call__(self, case: Case) -> Case:
        config, work = case.config, case.work
        for key, value in {**self.values, **self.also}.items():
            section, _, name = key.partition(".")
            changed = getattr(config, section).model_copy(update={name: value})
            config = config.model_copy(update={section: changed})
        limit = config.data.max_response_tokens
        work = replace(work, limit=limit, response=min(work.response, limit), teacher=min(work.teacher, limit))
        return replace(case, config=config, work=work)


def _changes(case: Case) -> list[_Change]:
    """The changes that are open, the ones that cost least first."""
    config, changes = case.config, []
    models = ["student", *(["discriminator"] if case.has_discriminator else [])]
    if case.offload == "none":
        kind = "pinned" if case.machine.kind == "cuda" else "file"
        changes.append(_Change({"memory.offload": kind}, "copies between states"))
    if config.schedule.activation_checkpointing != "auto":
        changes.append(_Change({"schedule.activation_checkpointing": "auto"}, "layers are computed again"))
    wide = [model for model in models if getattr(config, model).dtype == "float32"]
    whole = [model for model in wide if getattr(config, model).adapter == "none"]
    on_device = [model for model in whole if getattr(config, model).master == "device"]
    if on_device and case.machine.kind == "cuda":
        cost = "weights and moments cross the link to the host in every update; the model computes with bfloat16"
        changes.append(_Change({f"{model}.master": "host" for model in on_device}, cost))
    if case.has_reference:
        changes.append(_Change({"algorithm.kl_coef": 0.0}, "no reference policy, no KL term"))
    for model in wide:
        also = {f"{model}.autocast": "none", f"{model}.master": "device"}
        cost = "updates below its 8 bits are lost: raise the learning rate"
        changes.append(_Change({f"{model}.dtype": "bfloat16"}, cost, also))
    if config.data.max_response_tokens > 512:
        half = config.data.max_response_tokens // 2
        changes.append(_Change({"data.max_response_tokens": half}, "more responses are cut"))
    return changes


def _together(case: Case, changes: list[_Change]) -> list[Advice]:
    """As few of the changes as fit together, the costly ones left out first. Of masters in host memory and narrower
    ones only either can be."""

    def planned(some: list[_Change]) -> Plan:
        changed = case
        for change in some:
            changed = change(changed)
        return make_plan(changed)

    for other in (".dtype", ".master"):
        kept = [change for change in changes if not any(key.endswith(other) for key in change.values)]
        if not planned(kept).fits:
            continue
        for change in reversed(kept):
            fewer = [one for one in kept if one is not change]
            if planned(fewer).fits:
                kept = fewer
        return [Advice(" and ".join(change.name for change in kept), "all of these", planned(kept).room, True)]
    return []


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
