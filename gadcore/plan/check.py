"""Whether a run fits its machine, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from gadcore.config.kinds import Section
from gadcore.config.settings import Config
from gadcore.data.groups import Group
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.memory.ledger import GIB
from gadcore.plan.command import build_case, threads_of
from gadcore.plan.memory import Case
from gadcore.plan.planning import Plan, advise, as_given, ledger, make_plan, nearest_that_fits, utilisation
from gadcore.plan.settings import PlanSettings
from gadcore.plan.workload import Counted

S = TypeVar("S", bound=Section)


class Fitted(NamedTuple):
    """config: with what was changed for the run to fit. notes: sentences that say so. lines: bytes of every state.
    step_seconds: predicted, of a step of each stage; empty where nothing is predicted.
    """

    config: Config
    notes: list[str]
    lines: list[str]
    step_seconds: Mapping[str, float]


def fit(
    config: Config, student_path: str, groups: Sequence[Group], stages: Sequence[str], world: World = ALONE
) -> Fitted:
    """The settings with which a run fits this machine, by prediction alone.

    What nobody chose is lowered where that makes it fit: schedule.micro_batch_tokens, and on a GPU
    rollout.gpu_memory_utilization; there "auto" recomputation becomes what the prediction rests on. A preset's values
    count as not chosen, one of the user's file or command line is never changed. The hub is not asked.
    Raises UserError, with what would make it fit, where nothing of that does. A model that the planner cannot read ends
    no run: that is said instead.

    student_path: where the student's config.json is. groups: trained on. world: the processes that the run is cut over.
    """
    try:
        case = _case(config, student_path, groups, stages, world)
    except UserError as error:
        return Fitted(config, [f"the memory of this run is not predicted: {error}"], [], {})
    given, lowered, told = as_given(case), _open(config), []
    if "rollout.gpu_memory_utilization" not in lowered:
        trusted = as_given(case, sequence_fits=True)
        if trusted.choice.kv_bytes > given.choice.kv_bytes:
            # What vLLM takes beside its cache is assumed: it says itself where a user's share is not enough.
            told.append(f"{given.problems[-1]} (rollout.gpu_memory_utilization)")
            given = trusted
    plan = given if given.fits else nearest_that_fits(case, given, lowered)
    if plan is None:
        raise UserError(_refusal(given))
    config, notes = _with(config, given, plan)
    notes = [*told, *notes]
    needed, machine = plan.memory[plan.fullest].total, case.machine
    if machine.kind == "cpu" and needed > machine.figures["memory_bytes"] * (1 - machine.figures["reserve_share"]):
        notes.append(
            f"the state {plan.fullest} is predicted to need {needed / GIB:.2f} GiB of this machine's "
            f"{machine.figures['memory_bytes'] / GIB:.2f} GiB: others may have to give way"
        )
    verdict = f"memory, predicted, {plan.fullest} is the fullest state: {plan.room / 1e9:.2f} GB left"
    step_seconds = {stage: sum(phases.values()) for stage, phases in plan.time.steps.items()}
    return Fitted(config, notes, [*ledger(plan), verdict], step_seconds)


def _case(config: Config, student_path: str, groups: Sequence[Group], stages: Sequence[str], world: World) -> Case:
    here = config.model_copy(update={"student": config.student.model_copy(update={"model": student_path})})
    counted = Counted.of(groups, config)
    case, _ = build_case(
        here, PlanSettings(), threads_of(config), counted, stages, processes=world.size, nodes=world.nodes
    )
    machine = case.machine
    if machine.kind == "cpu" and machine.limit is None:
        # Others may give way there: only what cannot be is refused.
        machine = replace(machine, limit=machine.figures["memory_bytes"])
    return replace(case, machine=machine)


def _open(config: Config) -> frozenset[str]:
    """Settings that a plan may lower."""
    chosen = {f"schedule.{name}" for name in config.schedule.model_fields_set}
    chosen |= {f"rollout.{name}" for name in config.rollout.model_fields_set}
    return frozenset({"schedule.micro_batch_tokens", "rollout.gpu_memory_utilization"} - chosen)


def _with(config: Config, given: Plan, plan: Plan) -> tuple[Config, list[str]]:
    """(the settings of a plan, what was changed)."""
    schedule, notes = config.schedule, []
    values: dict[str, object] = {}
    update: dict[str, object] = {}
    if plan.choice.micro_batch_tokens != schedule.micro_batch_tokens:
        values["micro_batch_tokens"] = plan.choice.micro_batch_tokens
        notes.append(
            f"schedule.micro_batch_tokens = {plan.choice.micro_batch_tokens}, not {schedule.micro_batch_tokens}: with "
            f"more, the state {given.fullest} is predicted not to fit"
        )
    on_cuda = plan.case.machine.kind == "cuda"
    if on_cuda and schedule.activation_checkpointing == "auto":
        values["activation_checkpointing"] = plan.choice.mode
    if values:
        update["schedule"] = _updated(schedule, values)
    if on_cuda and plan.case.engine.holds_memory and plan.choice.kv_bytes != given.choice.kv_bytes:
        # Rounded towards what fits.
        share = int(utilisation(plan) * 100) / 100
        update["rollout"] = _updated(config.rollout, {"gpu_memory_utilization": share})
        notes.append(
            f"rollout.gpu_memory_utilization = {share:.2f}, not {config.vllm.gpu_memory_utilization:.2f}: predicted to "
            "hold vLLM's weights and a key-value cache, and no more than fits"
        )
    return config.model_copy(update=update), notes


def _updated(section: S, values: Mapping[str, object]) -> S:
    """A section with other values, which nobody has chosen."""
    chosen = set(section.model_fields_set)
    changed = section.model_copy(update=values)
    changed.model_fields_set.intersection_update(chosen)
    return changed


def _refusal(given: Plan) -> str:
    """Why a run does not begin, and what would make it fit."""
    memory = given.memory[given.fullest]
    parts = sorted([*memory.held.items(), *memory.working.items()], key=lambda item: -item[1])
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size > 0.01 * memory.total)
    machine = given.case.machine
    sentence = (
        f"this run does not fit {machine.name}: the state {given.fullest} is predicted to need "
        f"{memory.total / GIB:.2f} GiB of {machine.usable_bytes / GIB:.2f} GiB allowed (GiB: {told})"
    )
    if given.room >= 0:
        sentence = f"this run does not fit {machine.name}: {'; '.join(given.problems)}"
    return (
        f"{sentence}; what is predicted to make it fit:{_what_helps(given)}\n"
        "`python -m gadcore.run plan` with the same settings shows every figure; memory.limit_gib = N lets a run begin "
        "that is predicted to take N GiB"
    )


def _what_helps(given: Plan) -> str:
    best = make_plan(given.case)
    if best.fits:
        # It was the user's own choice that does not fit.
        values = [f"schedule.micro_batch_tokens = {best.choice.micro_batch_tokens}"]
        if best.case.engine.holds_memory and best.case.machine.kind == "cuda":
            values.append(f"rollout.gpu_memory_utilization = {utilisation(best):.2f}")
        return f"\n  set {' and '.join(values)}"
    advice = [item for item in advise(best, ranks=False) if item.fits]
    if not advice:
        return " nothing that is a setting: take a smaller model, or a larger machine"
    return "".join(f"\n  set {item.change} ({item.cost})" for item in advice)
