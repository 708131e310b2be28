"""The paper's presets on 1, 8 and 16 H100: what the guide says of them is what is planned."""

from __future__ import annotations

import pytest

from gadcore.config import loading
from gadcore.errors import UserError
from gadcore.plan.command import build_case, main
from gadcore.plan.machine import cpu, h100
from gadcore.plan.memory import holdings
from gadcore.plan.planning import as_given, make_plan
from gadcore.plan.settings import PlanSettings
from gadcore.plan.time import collective_bandwidth, run_time
from tests.support.plan_cases import preset_case
from tests.support.runs import ROOT

PRESETS = ("qwen2.5-3b", "llama-3.2-3b", "qwen2.5-7b", "llama-3.1-8b", "qwen2.5-14b")
WITH_ADAPTERS = ("qwen2.5-3b-lora", "qwen2.5-7b-lora", "llama-3.1-8b-lora", "qwen2.5-14b-lora")
MACHINES = {"1": ("h100-80gb",), "8": ("h100-80gb-x8",), "2 x 8": ("2x8-h100-80gb",)}
MACHINES["2 x 8, `replicate` 2"] = ("2x8-h100-80gb", "--distributed.replicate", "2")
ON_HOST = ("--student.master", "host", "--discriminator.master", "host")


def cell(preset: str, machine: str, *settings: str) -> str:
    plan = as_given(preset_case(preset, machine, *settings))
    if plan.fits:
        return f"{plan.time.total / 3600:.0f} h"
    if machine == "h100-80gb" and (plan := as_given(preset_case(preset, machine, *settings, *ON_HOST))).fits:
        return f"{plan.time.total / 3600:.0f} h, masters on the host"
    return "does not fit"


def row(preset: str) -> str:
    return " | ".join([f"| {preset}", *(cell(preset, *machine) for machine in MACHINES.values())]) + " |"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_guide_says_what_is_planned(preset: str) -> None:
    guide = (ROOT / "docs/guide/distributed.md").read_text()
    assert f"| preset | {' | '.join(MACHINES)} |" in guide
    assert row(preset) in guide.splitlines(), row(preset)


@pytest.mark.parametrize("preset", WITH_ADAPTERS)
def test_the_guide_says_what_is_planned_with_adapters(preset: str) -> None:
    guide = (ROOT / "docs/guide/distributed.md").read_text()
    counts = (1, 2, 8)
    assert f"| preset | {' | '.join(map(str, counts))} |" in guide
    cells = (cell(preset, f"h100-80gb-x{count}") for count in counts)
    row = f"| {preset} | {' | '.join(cells)} |"
    assert row in guide.splitlines(), row


def test_copies_take_memory_and_spare_the_network() -> None:
    one, two = (preset_case("qwen2.5-14b", "2x8-h100-80gb", *more) for more in ((), ("--distributed.replicate", "2")))
    assert (one.shards, two.shards) == (16, 8)
    choice = as_given(one).choice
    for name, size in holdings(one, choice).items():
        factor = 1 if name.startswith("engine.") else 2
        assert holdings(two, choice)[name] == pytest.approx(factor * size), name
    figures = one.machine.figures
    between = figures["network_link"] * 8 * figures["collective_share"]
    assert collective_bandwidth(one) == pytest.approx(between * 16 / 15)
    assert collective_bandwidth(two) == pytest.approx(figures["node_link"] * figures["collective_share"] * 8 / 7)
    # Slow between nodes: copies are what is left of it.
    slow = [
        build_case(case.config, PlanSettings(machine="2x8-h100-80gb", assume={"network_link": 1e9}), 1)[0]
        for case in (one, two)
    ]
    seconds = [run_time(case, choice).steps["gad"]["student"] for case in slow]
    assert seconds[1] < seconds[0]


def test_a_number_of_gpus_is_a_machine(capsys, monkeypatch) -> None:
    assert (h100(1, 1, "x").with_ranks(16).nodes, h100(1, 1, "x").with_ranks(16).per_node) == (2, 8)
    assert (h100(1, 1, "x").with_ranks(12).nodes, h100(1, 1, "x").with_ranks(12).per_node) == (2, 6)
    arguments = ["--preset", "qwen2.5-14b", "--run.device", "cpu", "--plan.gpus", "16"]
    assert main([*arguments, "--plan.check_activations", "false"]) == 0
    text = capsys.readouterr().out
    assert "ranks: 16." in text and "torchrun --nnodes 2 --nproc-per-node 8 -m gadcore.run" in text
    with pytest.raises(UserError, match="distributed.replicate = 3 copies do not divide 16 ranks"):
        main([*arguments, "--distributed.replicate", "3"])
    case = preset_case("qwen2.5-14b", "2x8-h100-80gb", "--rollout.tensor_parallel", "3")
    with pytest.raises(UserError, match="rollout.tensor_parallel = 3 does not divide the 16 ranks"):
        as_given(case)
    halved = as_given(preset_case("qwen2.5-14b", "2x8-h100-80gb", "--rollout.tensor_parallel", "2"))
    whole = make_plan(preset_case("qwen2.5-14b", "2x8-h100-80gb"))
    weights = [plan.memory["rollout"].held["engine.weights"] for plan in (halved, whole)]
    assert weights[0] == pytest.approx(weights[1] / 2)


def test_the_processes_of_a_cpu_share_its_memory() -> None:
    machine = cpu("a CPU", 16e9).with_ranks(4)
    assert machine.figures["memory_bytes"] == 4e9 and machine.ranks == 4 and "4 processes" in machine.name
    config = loading.load(["--student.adapter", "none", "--discriminator.adapter", "none"])
    alone, _ = build_case(config, PlanSettings(), 1)
    four, _ = build_case(config, PlanSettings(), 1, processes=4)
    assert four.machine.figures["memory_bytes"] == pytest.approx(alone.machine.figures["memory_bytes"] / 4)
    assert as_given(four).memory["student"].total > 0
