"""Plans without processes: every element of every engine once, from the right place, with the fewest bytes."""

from __future__ import annotations

import pytest
import torch

from gadcore.distributed.reshard import Layout, Mesh, Plan, make_plan
from gadcore.distributed.reshard_blocks import Block, NotACopy, check_covered, find_blocks
from tests.support.resharding import SHAPES, Engine, weights

MESHES = {
    "1": Mesh.even(1),
    "2": Mesh.even(2),
    "3": Mesh.even(3),
    "8": Mesh.even(8),
    "2 x 2": Mesh.even(2, replicas=2),
    "other order": Mesh(((3, 1), (0, 2))),
}
CASES = [(mesh, parallel) for mesh in MESHES for parallel in (1, 2) if MESHES[mesh].size % parallel == 0]


def layout_of(mesh: Mesh, parallel: int, *, trainer=torch.float32, engine=torch.bfloat16) -> Layout:
    made = [Engine(rank % parallel, parallel, device="meta", dtype=engine) for rank in range(mesh.size)]
    return Layout(
        mesh,
        SHAPES,
        dict.fromkeys(SHAPES, trainer),
        {name: p.dtype for name, p in made[0].parameters.items()},
        [find_blocks(engine.load, engine.parameters, SHAPES) for engine in made],
    )


def plans_of(layout: Layout, **limits: int) -> list[Plan]:
    return [make_plan(layout, rank, **limits) for rank in range(layout.mesh.size)]


@pytest.mark.parametrize(("mesh", "parallel"), CASES)
def test_every_element_arrives_once_from_the_rank_that_has_it(mesh: str, parallel: int) -> None:
    layout = layout_of(MESHES[mesh], parallel)
    whole, replica_of = weights(), MESHES[mesh].replica_of()
    for plan in plans_of(layout, bucket_bytes=64):
        target = plan.rank
        expected, engine = (Engine(target % parallel, parallel) for _ in range(2))
        expected.load(whole.items())
        times = {name: torch.zeros_like(p, dtype=torch.int64) for name, p in engine.parameters.items()}
        for piece in (*plan.own, *plan.takes):
            b = piece.block
            source = whole[b.source].reshape(len(whole[b.source]), -1)
            chunk = MESHES[mesh].chunk(len(source))
            # All its rows are that rank's.
            assert {row // chunk for row in range(b.source_row, b.source_row + b.rows)} == {
                replica_of[target].index(piece.source)
            }
            place = (slice(b.row, b.row + b.rows), slice(b.column, b.column + b.columns))
            matrix = engine.parameters[b.target].data
            matrix = matrix if matrix.dim() > 1 else matrix[:, None]
            taken = source[b.source_row : b.source_row + b.rows, b.source_column : b.source_column + b.columns]
            matrix[place] = taken
            count = times[b.target]
            (count if count.dim() > 1 else count[:, None])[place] += 1
        for name, p in engine.parameters.items():
            padding = times[name] == 0
            assert times[name].max() == 1
            assert torch.equal(p[~padding], expected.parameters[name][~padding])
            assert (expected.parameters[name][padding] == 0).all(), "what no piece reaches is padding"


@pytest.mark.parametrize(("mesh", "parallel"), CASES)
def test_both_ends_of_a_wire_agree_and_nothing_is_sent_that_is_there(mesh: str, parallel: int) -> None:
    layout = layout_of(MESHES[mesh], parallel)
    plans = plans_of(layout, bucket_bytes=64)
    for plan in plans:
        assert plan.buckets == plans[0].buckets and plan.sent == plans[0].sent
        for other in plans:
            sends = [piece for piece in plan.sends if piece.target == other.rank]
            takes = [piece for piece in other.takes if piece.source == plan.rank]
            assert [(p.unit, p.block) for p in sends] == [(p.unit, p.block) for p in takes]
        size = sum(p.block.rows * p.block.columns * 2 for p in plan.takes)
        assert size == plan.received[plan.rank] == plan.minimum[plan.rank]
        assert sum(p.block.rows * p.block.columns * 2 for p in plan.own) == plan.kept[plan.rank]
    # Counted element by element, with nothing of the plan.
    for rank, plan in enumerate(plans):
        missing = 0
        shard = next(row.index(rank) for row in layout.mesh.ranks if rank in row)
        for b in layout.blocks[rank]:
            chunk = layout.mesh.chunk(SHAPES[b.source][0])
            missing += sum(2 * b.columns for r in range(b.source_row, b.source_row + b.rows) if r // chunk != shard)
        assert plan.received[rank] == missing
    assert sum(plans[0].sent) == sum(plans[0].received)


def test_buckets_stay_below_the_limit_and_hold_every_unit() -> None:
    layout = layout_of(Mesh.even(4), 2)
    for limit in (1, 200, 1000, 1 << 20):
        plans = plans_of(layout, bucket_bytes=limit)
        buckets = plans[0].buckets
        assert [b.begin for b in buckets] == [0, *(b.end for b in buckets[:-1])]
        # A row, from every shard.
        row = 2 * max(s[-1] if len(s) > 1 else 1 for s in SHAPES.values()) * 4
        for plan in plans:
            for bucket in buckets:
                for pieces in (plan.sends, plan.takes):
                    size = sum(
                        2 * p.block.rows * p.block.columns for p in pieces if bucket.begin <= p.unit < bucket.end
                    )
                    assert size <= max(limit, row)
    assert len(plans[0].buckets) == 1


def test_one_rank_that_has_all_sends_nothing() -> None:
    plan = make_plan(layout_of(Mesh.even(1), 1), 0)
    assert plan.received == [0] and all(bucket.idle for bucket in plan.buckets)


def test_what_travels_has_the_narrower_dtype() -> None:
    narrow = make_plan(layout_of(Mesh.even(2), 2, trainer=torch.bfloat16, engine=torch.float32), 0)
    wide = make_plan(layout_of(Mesh.even(2), 2, trainer=torch.float32, engine=torch.float32), 0)
    assert [2 * count for count in narrow.received] == wide.received
    assert {bucket.dtype for bucket in narrow.buckets} == {torch.bfloat16}


def test_the_loader_is_watched_and_nothing_changes() -> None:
    engine = Engine(1, 2)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    blocks = find_blocks(engine.load, engine.parameters, SHAPES)
    assert all(torch.equal(p, before[name]) for name, p in engine.parameters.items())
    assert Block("qkv.weight", 6, 0, "k.weight", 3, 0, 3, 12) in blocks
    assert Block("o.weight", 0, 0, "o.weight", 0, 6, 12, 6) in blocks
    meta = Engine(1, 2, device="meta")
    assert find_blocks(meta.load, meta.parameters, SHAPES) == blocks


def found(load, shape=(4, 6), target=(4, 6)):
    parameters = {"p": torch.zeros(target)}
    return find_blocks(lambda weights: load(parameters["p"], dict(weights)["w"]), parameters, {"w": shape})


def test_casts_and_copies_on_the_way_are_the_same_values() -> None:
    expected = [Block("p", 0, 0, "w", 0, 0, 4, 6)]
    assert found(lambda p, w: p.copy_(w.to(torch.bfloat16).clone().view(4, 6))) == expected
    assert found(lambda p, w: p.view(2, 2, 6).copy_(w.view(2, 2, 6))) == expected


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda p, w: p.copy_(w + 1), "no part of the trainer's weights"),
        (lambda p, w: p.copy_(w.clone().add_(1)), "changes values of w"),
        (lambda p, w: p.copy_(w).add_(1), "changes values of p"),
        (lambda p, w: p.copy_(w.t().contiguous().view(4, 6)), "view"),
        (lambda p, w: p.view(-1)[1:9].copy_(w.view(-1)[1:9]), "no block"),
        (lambda p, w: p.t().copy_(w.t()), "no block"),
        (lambda p, w: p[:, ::2].copy_(w[:, ::2]), "no block"),
        (lambda p, w: p.copy_(w[:1]), "stores 1 x 6 of the trainer's w as 4 x 6 of p"),
    ],
)
def test_what_is_no_copy_of_a_block_is_refused(load, said: str) -> None:
    with pytest.raises((NotACopy, RuntimeError), match=said):
        found(load)


def test_elements_without_a_weight_and_with_two_are_refused() -> None:
    with pytest.raises(RuntimeError, match="rows 2 to 3 of p are written by no weight"):
        found(lambda p, w: p[:2].copy_(w[:2]))
    with pytest.raises(RuntimeError, match="rows 1 to 1 of p are written twice"):
        found(lambda p, w: (p[:2].copy_(w[:2]), p[1:].copy_(w[1:])))
    with pytest.raises(RuntimeError, match="written by no weight"):
        found(lambda p, w: p[:, :3].copy_(w[:, :3]))
    with pytest.raises(RuntimeError, match="stores the trainer's v nowhere"):
        p = torch.zeros(2, 2)
        find_blocks(lambda weights: p.copy_(dict(weights)["w"]), {"p": p}, {"w": (2, 2), "v": (1, 1)})
    check_covered({"p": (2, 4)}, [Block("p", 0, 0, "w", 0, 0, 2, 2)], [Block("p", 0, 2, "", 0, 0, 2, 2)])
