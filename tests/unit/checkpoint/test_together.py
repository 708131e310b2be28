"""What several processes write together: each its shards, whole or absent, for any number of processes to read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gadcore.checkpoint import shards, store
from gadcore.checkpoint.together import Together
from gadcore.distributed.world import World
from gadcore.errors import UserError
from gadcore.models.state import copy_into
from tests.support.ranks import run_ranks

# Several processes: half a minute to start them.
pytestmark = pytest.mark.slow

# Uneven rows; fewer rows than processes; no dimension; bytes.
SHAPES = {"wide": (7, 5), "head": (1, 3), "vector": (5,), "one": (), "bytes": (9,)}


def whole(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made | {"bytes": torch.arange(9, dtype=torch.uint8) + step, "wide16": made["wide"].bfloat16()}


def cut(world: World, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    places = [Shard(0)] if world.mesh.ndim == 1 else [Replicate(), Shard(0)]
    return {n: distribute_tensor(t, world.mesh, places) if t.dim() else t for n, t in tensors.items()}


def locals_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t._local_tensor if isinstance(t, DTensor) else t for n, t in tensors.items()}


def write_and_read(world: World, root: Path, asynchronous: bool) -> dict:
    """Saves two steps, reads them again; then what a failing process does to the others."""
    together = Together(world, asynchronous=asynchronous)
    found = {}
    for step in (1, 2):
        tensors = {"m": cut(world, whole(step)), "rng": {f"rank-{world.rank}.cpu": torch.tensor([world.rank])}}
        together.save(root, step, tensors, {"step": step}, keep=2)
    found["there before it is finished"] = (root / "step-000002").exists()
    together.finish()
    saved = store.load(root / "step-000002", world)
    empty = cut(world, {n: torch.zeros_like(t) for n, t in whole(2).items()})
    copy_into(empty, saved.tensors["m"])
    expected = locals_of(cut(world, whole(2)))
    found["read"] = all(torch.equal(t, expected[n]) for n, t in locals_of(empty).items())
    found["others"] = sorted(saved.tensors["rng"])
    # What one process wrote is read in shards as well.
    if world.is_first:
        store.save(root / "one", 1, {"m": whole(1)}, {}, keep=1)
    world.barrier()
    copy_into(empty, store.load(root / "one/step-000001", world).tensors["m"])
    expected = locals_of(cut(world, whole(1)))
    found["read of one"] = all(torch.equal(t, expected[n]) for n, t in locals_of(empty).items())

    def fails(*_args, **_kwargs):
        raise OSError(28, os.strerror(28))

    own, told = shards.save_file, []
    for rank in range(world.size):
        shards.save_file = fails if world.rank == rank else own
        try:
            together.save(root, 3, {"m": cut(world, whole(3))}, {}, keep=1)
            together.finish()
        except UserError as error:
            told.append(str(error))
    shards.save_file = own
    together.close()
    return found | {"told": told}


@pytest.fixture(scope="module", params=[(2, 1, False), (4, 2, True)], ids=["2", "2x2, asynchronous"])
def written(request, module_folder):
    size, replicas, asynchronous = request.param
    root = module_folder / f"root-{size}"
    function = "tests.unit.checkpoint.test_together:write_and_read"
    return size, root, asynchronous, run_ranks(size, function, root, asynchronous, replicas=replicas)


def test_every_process_reads_back_what_it_held(written) -> None:
    size, _, asynchronous, found = written
    for each in found:
        assert each["read"] and each["read of one"]
        assert each["others"] == [f"rank-{rank}.cpu" for rank in range(size)]
        assert not (asynchronous and each["there before it is finished"])


def test_a_full_disk_of_one_is_told_by_all_and_leaves_nothing(written) -> None:
    size, root, _, found = written
    for each in found:
        assert len(each["told"]) == size
        for rank, told in enumerate(each["told"]):
            assert told == f"cannot write a checkpoint in {root}: rank {rank}: No space left on device", told
    assert sorted(path.name for path in root.iterdir()) == ["one", "step-000001", "step-000002"]


def test_one_process_reads_it_and_nothing_is_pickled(written) -> None:
    size, root, _, _ = written
    saved = store.load(root / "step-000002")
    assert saved.ranks == size and saved.state == {"step": 2} and saved.step == 2
    for name, tensor in whole(2).items():
        assert torch.equal(saved.tensors["m"][name], tensor), name
    into = {name: torch.zeros_like(tensor) for name, tensor in whole(2).items()}
    copy_into(into, saved.tensors["m"])
    assert all(torch.equal(into[name], tensor) for name, tensor in whole(2).items())
    names = {path.name for path in (root / "step-000002").iterdir()}
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}


def test_a_copy_of_a_copy_is_written_once(written) -> None:
    _, root, _, _ = written
    rows = 0
    for file in (root / "step-000002").glob("m-*.safetensors"):
        with safe_open(file, "pt") as tensors:
            rows += tensors.get_slice("m/wide").get_shape()[0] if "m/wide" in tensors.keys() else 0  # noqa: SIM118
    assert rows == SHAPES["wide"][0]


@pytest.mark.parametrize("harm", ["cut", "flip", "missing"])
def test_damage_of_any_file_is_told(written, tmp_path, harm) -> None:
    _, root, _, _ = written
    file = sorted((root / "step-000001").glob("m-*.safetensors"))[-1]
    content = file.read_bytes()
    try:
        if harm == "missing":
            file.unlink()
        else:
            file.write_bytes(content[:-1] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=file.name):
            store.load(root / "step-000001")
    finally:
        file.write_bytes(content)
    store.load(root / "step-000001")


def test_a_manifest_of_the_future_is_refused(written) -> None:
    _, root, _, _ = written
    file = root / "step-000001/manifest.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"format": 3}))
    with pytest.raises(UserError, match="has format 3, this version reads formats 1 and 2"):
        store.load(root / "step-000001")
    file.write_text(content)
