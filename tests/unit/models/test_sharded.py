"""Student and discriminator in shards over several processes train as they do in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from gadcore.distributed.world import World
from tests.support.ranks import run_ranks
from tests.support.sharding import Case, relative, save_uneven, train

HERE = "tests.unit.models.test_sharded"


def cases(folder: Path) -> dict[str, Case]:
    tied, untied = Case(folder / "qwen2"), Case(folder / "llama")
    return {
        "tied": tied,
        "untied": untied,
        "in files": replace(tied, offload="file"),
        "an idle process": replace(untied, count=1, micro_batch_tokens=10**6),
        "autocast": replace(tied, autocast="bfloat16"),
    }


def two(world: World, folder: Path) -> dict:
    return {name: train(case, world, folder / f"{name}-{world.rank}") for name, case in cases(folder).items()}


def four(world: World, folder: Path) -> dict:
    case = cases(folder)["tied"]
    found = {"sharded": train(case, world, folder / f"four-{world.rank}")}
    copies = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found["two copies"] = train(case, replace(world, mesh=copies), folder / f"hybrid-{world.rank}")
    return found


@pytest.fixture(scope="module")
def folder(module_folder: Path) -> Path:
    save_uneven(module_folder / "qwen2", "qwen2", tied=True)
    save_uneven(module_folder / "llama", "llama", tied=False)
    return module_folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict:
    torch.set_num_threads(1)
    return {name: train(case) for name, case in cases(folder).items()}


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict]:
    return run_ranks(2, f"{HERE}:two", folder, deadline=240)


@pytest.fixture(scope="module")
def of_four(folder: Path) -> list[dict]:
    return run_ranks(4, f"{HERE}:four", folder, deadline=240)


@pytest.mark.parametrize("name", ["tied", "untied", "in files", "an idle process", "autocast"])
def test_two_processes_train_as_one(alone, of_two, name):
    for found in of_two:
        got, expected = found[name], alone[name]
        print(name, relative(got["figures"], expected["figures"]), relative(got["weights"], expected["weights"]))
    assert relative(got["figures"], expected["figures"]) < 1e-5
    assert relative(got["weights"], expected["weights"]) < 1e-5
    assert of_two[0][name]["figures"] == of_two[1][name]["figures"]


@pytest.mark.parametrize("name", ["sharded", "two copies"])
def test_four_processes_train_as_one(alone, of_four, name):
    got, expected = of_four[0][name], alone["tied"]
    print(name, relative(got["figures"], expected["figures"]), relative(got["weights"], expected["weights"]))
    assert relative(got["figures"], expected["figures"]) < 1e-5
    assert relative(got["weights"], expected["weights"]) < 1e-5
    assert all(found[name]["figures"] == got["figures"] for found in of_four)
