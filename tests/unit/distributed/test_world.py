"""The processes of a job: collectives of four, the world of one, and errors that are everybody's."""

from __future__ import annotations

import os

import pytest
import torch

from gadcore.distributed.world import World, join_world
from gadcore.errors import UserError
from tests.support.ranks import run_ranks

HERE = "tests.unit.distributed.test_world"


def collectives(world: World) -> dict:
    rank = world.rank
    found = {
        "rank": (rank, world.local_rank, world.nodes, world.is_first),
        "place": (
            world.shards,
            world.shard,
            world.replica,
            world.neighbours,
            tuple(world.mesh.mesh_dim_names),
            tuple(world.mesh.shape),
        ),
        "mine": list(world.mine(range(10))),
        "sum": world.sum_(torch.tensor([1.0, rank])).tolist(),
        "max": world.max_(torch.tensor([-rank, rank])).tolist(),
        "all": world.all_gather(torch.tensor([[rank, 1]])).tolist(),
        "objects": world.all_gather_objects({"rank": rank}),
        "first": world.broadcast_object(f"of rank {rank}"),
    }
    world.barrier()
    world.agree(None)
    for kind, raised in (("user", UserError("data.train is not there")), ("other", ValueError("a shape is wrong"))):
        try:
            with world.agreeing():
                if rank == 2:
                    raise raised
        except Exception as error:
            found[kind] = (type(error).__name__, str(error))
    return found


def fails_on_one(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("this one gives up")
    world.barrier()


@pytest.fixture(scope="module")
def four() -> list[dict]:
    return run_ranks(4, f"{HERE}:collectives", replicas=2, per_node=2, deadline=90)


def test_everybody_knows_its_place(four):
    assert [found["rank"] for found in four] == [(0, 0, 2, True), (1, 1, 2, False), (2, 0, 2, False), (3, 1, 2, False)]
    assert [found["place"] for found in four] == [
        (2, i % 2, i // 2, 2, ("replicate", "shard"), (2, 2)) for i in range(4)
    ]
    assert sorted(item for found in four for item in found["mine"]) == list(range(10))


def test_collectives_give_everybody_the_same(four):
    for found in four:
        assert found["sum"] == [4.0, 6.0] and found["max"] == [0, 3]
        assert found["all"] == [[[rank, 1]] for rank in range(4)]
        assert found["objects"] == [{"rank": rank} for rank in range(4)]
        assert found["first"] == "of rank 0"


def test_an_error_of_one_is_an_error_of_all(four):
    for rank, found in enumerate(four):
        assert found["user"] == ("UserError", "data.train is not there")
        text = "a shape is wrong"
        assert found["other"] == (("ValueError", text) if rank == 2 else ("RuntimeError", f"rank 2 failed: {text}"))


def test_a_process_alone_asks_nobody():
    world = World.alone()
    tensor = torch.tensor([3.0])
    assert world.sum_(tensor) is tensor and world.max_(tensor) is tensor and tensor.item() == 3
    assert world.all_gather(tensor).tolist() == [[3.0]] and (world.replica, world.neighbours) == (0, 1)
    assert world.all_gather_objects(5) == [5] and world.broadcast_object(6) == 6
    assert world.mine([1, 2]) == [1, 2] and world.is_first and world.shards == 1 and world.shard == 0
    with pytest.raises(ValueError, match="its own"), world.agreeing():
        raise ValueError("its own")


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world(torch.device("cpu")) as world:
        assert world is World.alone() and not torch.distributed.is_initialized()


def test_copies_must_divide_the_processes(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    with (
        pytest.raises(UserError, match="4 processes cannot hold 3 copies"),
        join_world(torch.device("cpu"), replicas=3),
    ):
        pass


def test_the_helper_tells_who_failed():
    with pytest.raises(AssertionError, match="this one gives up"):
        run_ranks(2, f"{HERE}:fails_on_one", deadline=60)
