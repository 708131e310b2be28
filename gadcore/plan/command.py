"""python -m gadcore.run plan: memory and time of a run, predicted from its settings and a machine.

python -m gadcore.run plan --preset qwen2.5-14b --plan.gpus 16  the paper's: two nodes of 8 H100
python -m gadcore.run plan --preset qwen2.5-14b --plan.machine 2x8-h100-80gb
python -m gadcore.run plan --calibrate                          measure this machine, then plan the default job on it
python -m gadcore.run plan --plan.against runs/latest           the prediction beside what a run measured
python -m gadcore.run plan --preset qwen2.5-7b --plan.assume product_share=0.5 --plan.out plan.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.files import write_whole
from gadcore.plan import settings
from gadcore.plan.assumptions import Assumption
from gadcore.plan.settings import PlanSettings

if TYPE_CHECKING:
    from gadcore.plan.memory import Case
    from gadcore.plan.planning import Plan
    from gadcore.plan.workload import Counted


def main(arguments: Sequence[str], prepare: Callable[[Config], None] | None = None) -> int:
    """Runs the command; returns the exit code: 0 where it fits, 1 where it does not. Raises UserError for bad input.

    prepare: called with the run's settings before torch is loaded.
    """
    config, plan = settings.load(arguments)
    if prepare is not None:
        prepare(config)
    # Imported only now: torch reads the environment when it is loaded.
    from gadcore.config.device import quiet

    quiet()
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=150)
    if plan.calibrate:
        _calibrate(config, console)
    if plan.against:
        return _compare(config, plan, console)
    return _plan(config, plan, console)


def threads_of(config: Config, folder: Path | None = None) -> int:
    """CPU threads: of a finished run, of the settings, or what torch takes."""
    import torch

    if folder is not None and (folder / "summary.json").is_file():
        machine = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("machine", {})
        if machine.get("threads"):
            return int(machine["threads"])
    return config.run.threads or torch.get_num_threads()


def build_case(
    config: Config,
    plan: PlanSettings,
    threads: int,
    counted: Counted | None = None,
    stages: Sequence[str] | None = None,
    *,
    processes: int = 1,
    nodes: int = 1,
) -> tuple[Case, list[Assumption]]:
    """(what is planned for, every assumption of it). Raises UserError for a model, machine or data that is unknown.

    counted: the training rows, where they have been read already. stages: by name; default those of `train`.
    processes: of the job that plans for itself, on `nodes` machines like this one.
    """
    from gadcore.config.device import device_of
    from gadcore.memory.ledger import GIB
    from gadcore.plan.dimensions import read_dimensions
    from gadcore.plan.machine import find
    from gadcore.plan.memory import Case
    from gadcore.plan.workload import read_workload
    from gadcore.rollout.engine import engine_class

    kind = device_of(config).type if plan.machine == "here" else None
    elsewhere = plan.gpus is not None and kind == "cpu"
    machine = find("h100-80gb" if elsewhere else plan.machine, threads, plan.assume, kind=kind)
    if plan.gpus is not None:
        machine = machine.with_ranks(plan.gpus)
    if processes > 1:
        machine = machine.with_ranks(processes, processes // nodes)
    if machine.ranks % config.distributed.replicate:
        raise UserError(
            f"distributed.replicate = {config.distributed.replicate} copies do not divide {machine.ranks} ranks of "
            f"{machine.name}: take 1, or the number of nodes"
        )
    if config.memory.limit_gib is not None:
        machine = replace(machine, limit=config.memory.limit_gib * GIB)
    student = read_dimensions(config.student.model)
    name = config.discriminator.model
    discriminator = student if name in ("student", config.student.model) else read_dimensions(name)
    engine = config.rollout.engine
    if machine.ranks > 1 and not engine_class(config).spans_ranks:
        raise UserError(f'rollout.engine = "{engine}" samples on one device, {machine.name} has {machine.ranks}')
    work, items = read_workload(config, plan, counted, stages)
    return Case(config, student, discriminator, machine, work), [*items, *machine.figures.listed()]


def _plan(config: Config, plan: PlanSettings, console: Console) -> int:
    from gadcore.plan.assumptions import RULES
    from gadcore.plan.planning import advise, as_given, make_plan
    from gadcore.plan.show import resharding_table, show

    case, assumptions = build_case(config, plan, threads_of(config))
    checks: list[str] = []
    if plan.check_activations:
        case, checks = with_checked_activations(case)
    found, given = make_plan(case), as_given(case)
    advice = advise(found)
    show(console, found, given, assumptions, advice, checks)
    moved = []
    if plan.resharding:
        from gadcore.plan.resharding import of_case

        moved = of_case(case)
        console.print(resharding_table(moved))
    if plan.out:
        content = {
            "predicted": True,
            "machine": {"name": case.machine.name, "nodes": case.machine.nodes, "ranks": case.machine.ranks},
            "student": asdict(case.student),
            "discriminator": asdict(case.discriminator),
            "workload": asdict(case.work),
            "to_use": _as_dict(found),
            "as_given": _as_dict(given),
            "advice": [asdict(item) for item in advice],
            "checks": checks,
            "resharding": [asdict(item) | {"seconds": item.seconds} for item in moved],
            "assumptions": [asdict(item) for item in assumptions],
            "rules": RULES,
            "settings": config.model_dump(),
        }
        write_whole(Path(plan.out), json.dumps(content, indent=2) + "\n")
        console.print(plan.out)
    return 0 if found.fits else 1


def _as_dict(plan: Plan) -> dict[str, Any]:
    from gadcore.plan.memory import host_bytes

    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "choice": asdict(plan.choice),
        "offload": plan.case.offload,
        "room_bytes": plan.room,
        "host_bytes": host_bytes(plan.case, plan.choice),
        "usable_bytes": plan.case.machine.usable_bytes,
        "memory_bytes": {
            state: {"held": memory.held, "working": memory.working, "total": memory.total}
            for state, memory in plan.memory.items()
        },
        "seconds": {**asdict(plan.time), "phases": plan.time.phases, "total": plan.time.total},
    }


def with_checked_activations(case: Case) -> tuple[Case, list[str]]:
    """(the case with what the real code keeps on fake tensors, a sentence for every model beside the formula)."""
    from gadcore.models.activations import MODES
    from gadcore.plan.activations import fake_layer_bytes, layer_bytes
    from gadcore.plan.dimensions import read_config

    sentences, checked = [], {}
    for d in dict.fromkeys((case.student.name, case.discriminator.name)):
        dimensions = case.student if d == case.student.name else case.discriminator
        _, settings_of_model = read_config(d)
        real = {mode: fake_layer_bytes(settings_of_model, mode) for mode in MODES}
        formula = {mode: layer_bytes(dimensions, mode, autocast=False) for mode in MODES}
        checked[d] = replace(dimensions, kept_scale={mode: real[mode] / formula[mode] for mode in MODES})
        figures = ", ".join(
            f"{mode} {formula[mode]} / {real[mode]:.0f} = {formula[mode] / real[mode]:.3f}" for mode in MODES
        )
        sentences.append(
            f"activations of {d}, bytes of a layer and token in float32, by formula / in a fake-tensor run of the "
            f"code: {figures}; the latter is used"
        )
    return replace(case, student=checked[case.student.name], discriminator=checked[case.discriminator.name]), sentences


def _calibrate(config: Config, console: Console) -> None:
    import torch

    from gadcore.plan.calibrate import measure
    from gadcore.plan.calibration import keep
    from gadcore.plan.dimensions import read_config, read_dimensions

    threads = threads_of(config)
    torch.set_num_threads(threads)
    d, (_, settings_of_model) = read_dimensions(config.student.model), read_config(config.student.model)
    figures = measure(d, settings_of_model, lambda part: console.print(f"measuring {part}"))
    console.print(f"{keep(figures, threads)}: {len(figures)} figures, {threads} threads, sizes of {d.name}")


def _compare(config: Config, plan: PlanSettings, console: Console) -> int:
    from gadcore.plan.against import compare
    from gadcore.plan.show import comparison_table

    assert plan.against is not None
    folder = Path(plan.against)
    case, _ = build_case(config, plan, threads_of(config, folder))
    found = compare(folder, case)
    console.print(comparison_table(found))
    for note in case.machine.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if plan.out:
        content = [asdict(item) | {"ratio": item.ratio} for item in found]
        write_whole(Path(plan.out), json.dumps(content, indent=2) + "\n")
        console.print(plan.out)
    return 0
