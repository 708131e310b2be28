"""docs/measured/reshard.md: what is in it is what was counted, and predictions are called so."""

from __future__ import annotations

import torch

from bench import record
from bench.reshard.suite import DEGREES, KNOWN, SHARDS, SIZES, mistakes
from bench.reshard.tables import DOCUMENT, document
from bench.tables import rows_of
from gadcore.distributed.reshard import Layout, Mesh
from gadcore.distributed.reshard_blocks import Block
from gadcore.plan.machine import h100
from gadcore.plan.resharding import resharding
from tests.unit.distributed.test_reshard import layout_of


def test_the_document_is_made_of_the_results() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()
    assert "Not run" in document(lambda suite: [])


def test_every_model_has_every_size() -> None:
    rows = rows_of("reshard")
    assert record.path_of("reshard").is_file()
    sizes = {(row["model"], row["ranks"], row["replicas"], row["tensor_parallel"]) for row in rows}
    for model in (*KNOWN, *SIZES):
        assert {(model, shards, 1, degree) for shards in SHARDS for degree in DEGREES} <= sizes
    for row in rows:
        if "refused" in row:
            assert "divisible" in row["refused"]
        else:
            assert row["gate"] == "pass" and not row["mistakes"]
            assert row["received"] == row["minimum"] <= row["gathered"]


def test_a_plan_that_is_wrong_is_seen() -> None:
    layout = layout_of(Mesh.even(4), 2)
    assert mistakes(layout) == []
    twice = [[*blocks, blocks[-1]] for blocks in layout.blocks]
    assert (
        "written twice" in mistakes(Layout(layout.mesh, layout.shapes, layout.dtypes, layout.engine_dtypes, twice))[0]
    )
    holes = [[b for b in blocks if rank or b.source != "k.weight"] for rank, blocks in enumerate(layout.blocks)]
    assert (
        "written by no weight"
        in mistakes(Layout(layout.mesh, layout.shapes, layout.dtypes, layout.engine_dtypes, holes))[0]
    )


def test_seconds_follow_the_links() -> None:
    """One parameter of 8 GB over two nodes of two: halves of it come from the other node."""
    rows = 4 * 10**6
    block = Block("p", 0, 0, "w", 0, 0, rows, 1000)
    layout = Layout(
        Mesh.even(4), {"w": (rows, 1000)}, {"w": torch.bfloat16}, {"p": torch.bfloat16}, [[block]] * 4
    )  # fmt: skip
    found = resharding(layout, 1, h100(2, 2, "four"))
    figures = h100(2, 2, "four").figures
    assert (found.received, found.minimum, found.network, found.engine) == (6 * 10**9, 6 * 10**9, 4 * 10**9, 8 * 10**9)
    assert found.exchange_s == 4e9 / (figures["network_link"] * figures["collective_share"])
    inside = resharding(layout, 1, h100(1, 4, "one node"))
    assert inside.network == 0
    assert inside.exchange_s == 6e9 / (figures["node_link"] * figures["collective_share"])
    assert found.seconds == found.exchange_s + found.copy_s + found.fingerprint_s
