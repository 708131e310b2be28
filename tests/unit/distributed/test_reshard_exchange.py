"""Shards of four gloo processes pushed into engines with tensor parallelism: values, bytes, fingerprint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gadcore.distributed.reshard import Layout, Mesh, make_plan, mesh_of
from gadcore.distributed.reshard_blocks import find_blocks
from gadcore.distributed.reshard_exchange import Exchange
from gadcore.distributed.reshard_sums import differing, engine_sums, trainer_sums
from gadcore.distributed.world import SHARD, World
from tests.support.ranks import run_ranks
from tests.support.resharding import SHAPES, Engine, weights

HERE = "tests.unit.distributed.test_reshard_exchange"
PARALLEL = 2
LIMITS = (100, 1 << 20)


class Sharded(nn.Module):
    """The trainer's parameters, under their names."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            part, kind = name.split(".")
            if not hasattr(self, part):
                setattr(self, part, nn.Module())
            getattr(self, part).register_parameter(kind, nn.Parameter(value.clone()))


def parameters(model: nn.Module) -> list:
    return [(name, p.detach()) for name, p in model.named_parameters()]


def wrong(layout: Layout, world: World, model: nn.Module, engine: Engine) -> list[str]:
    """What the fingerprint finds."""
    expected = trainer_sums(layout.shapes, layout.stored, layout.mesh, world, parameters(model))
    return differing(list(layout.shapes), expected, engine_sums(layout, world, engine.parameters))


def of_both_meshes(world: World) -> list[list[dict]]:
    """pushes() of four shards, and of two copies of two shards."""
    one = init_device_mesh("cpu", (world.size,), mesh_dim_names=(SHARD,))
    return [pushes(replace(world, mesh=one)), pushes(world)]


def pushes(world: World) -> list[dict]:
    """What pushes of three sets of weights took and came to, for either engine's dtype and either limit."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for limit in LIMITS:
            model = fully_shard(Sharded(weights(0)), mesh=world.mesh)
            engine = Engine(world.rank % PARALLEL, PARALLEL, dtype=dtype)
            mesh = mesh_of(model.embed.weight, "embed.weight")
            own = find_blocks(engine.load, engine.parameters, SHAPES)
            layout = Layout(
                mesh,
                {name: tuple(p.shape) for name, p in parameters(model)},
                {name: p.dtype for name, p in parameters(model)},
                {name: p.dtype for name, p in engine.parameters.items()},
                world.all_gather_objects(own),
            )
            plan = make_plan(layout, world.rank, bucket_bytes=limit)
            exchange = Exchange(plan, engine.parameters)
            for seed in range(3):
                whole = weights(seed)
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        local, chunk = p.to_local(), mesh.chunk(p.shape[0])
                        local.copy_(whole[name][world.shard * chunk : world.shard * chunk + len(local)])
                stale = wrong(layout, world, model, engine)
                moved = exchange.push(parameters(model))
                after = wrong(layout, world, model, engine)
                expected = Engine(engine.rank, PARALLEL, dtype=dtype)
                expected.load(whole.items())
                real = VOCABULARY_ROWS[engine.rank]
                equal = all(
                    torch.equal(p[:real], expected.parameters[name][:real])
                    if name == "embed.weight"
                    else torch.equal(p, expected.parameters[name])
                    for name, p in engine.parameters.items()
                )
                found.append(
                    {
                        "equal": equal, "stale": stale, "after": after, "moved": (moved.sent, moved.received),
                        "planned": (plan.sent[world.rank], plan.minimum[world.rank]), "calls": moved.calls,
                        "busy": sum(not b.idle for b in plan.buckets), "buffers": moved.buffers, "limit": limit,
                    }
                )  # fmt: skip
            found[-1]["damage"] = damages(layout, world, model, engine)
    return found


# Of 21 rows in 24, for either rank of an engine.
VOCABULARY_ROWS = (12, 9)


def damages(layout: Layout, world: World, model: nn.Module, engine: Engine) -> list[list[str]]:
    """What the fingerprint says of a damage on the last rank alone."""
    down = engine.parameters["down.weight"].data
    kept, said = down.clone(), []

    def one() -> None:
        down[3, 2] += 1

    def rows() -> None:
        down[[0, 1]] = down[[1, 0]]

    def columns() -> None:
        down[:, [0, 1]] = down[:, [1, 0]]

    for damage in (one, rows, columns):
        if world.rank == world.size - 1:
            damage()
        said.append(wrong(layout, world, model, engine))
        down.copy_(kept)
    return said


@pytest.fixture(scope="module")
def both() -> list[list[list[dict]]]:
    return run_ranks(4, f"{HERE}:of_both_meshes", replicas=2, deadline=120)


@pytest.fixture(params=[0, 1], ids=["4", "2 x 2"])
def ranks(both, request) -> list[list[dict]]:
    return [found[request.param] for found in both]


def test_every_engine_holds_what_its_loader_would_have_stored(ranks) -> None:
    assert all(push["equal"] for rank in ranks for push in rank)


def test_bytes_on_the_wire_are_the_fewest(ranks) -> None:
    for rank in ranks:
        for push in rank:
            assert push["moved"] == push["planned"]
            assert push["calls"] == push["busy"]


def test_buffers_are_those_of_two_buckets(ranks) -> None:
    # A row from every shard is a bucket at least.
    assert all(push["buffers"] <= 4 * max(push["limit"], 4 * 4 * 12) for rank in ranks for push in rank)
    assert {push["calls"] for push in ranks[0] if push["limit"] == LIMITS[1]} == {1}


def test_the_fingerprint_tells_old_weights_and_every_damage(ranks) -> None:
    for rank in ranks:
        for push in rank:
            assert push["stale"] == list(SHAPES) and push["after"] == []
            assert all(said == ["down.weight"] for said in push.get("damage", []))
        assert sum(len(push.get("damage", [])) for push in rank) == 3 * 4


def test_a_parameter_that_is_not_cut_by_rows_is_refused() -> None:
    with pytest.raises(RuntimeError, match="the trainer's w is not sharded"):
        mesh_of(torch.zeros(2), "w")


def test_other_parameters_than_those_of_the_plan_are_refused() -> None:
    engine = Engine(0, 1)
    layout = Layout(
        Mesh.even(1), SHAPES, dict.fromkeys(SHAPES, torch.float32),
        {name: p.dtype for name, p in engine.parameters.items()},
        [find_blocks(engine.load, engine.parameters, SHAPES)],
    )  # fmt: skip
    exchange = Exchange(make_plan(layout, 0), engine.parameters)
    with pytest.raises(RuntimeError, match="other parameters than these: up.weight"):
        exchange.push([(name, value) for name, value in weights().items() if name != "up.weight"])
    exchange.push(weights().items())
    whole = Engine(0, 1)
    whole.load(weights().items())
    assert all(torch.equal(p, whole.parameters[name]) for name, p in engine.parameters.items() if "embed" not in name)
    with pytest.raises(ValueError, match="of no rank"):
        Exchange(make_plan(layout), engine.parameters)
