"""What a sync of shards moves, and for how long, on a machine that need not be there: a prediction.

The bytes are counted, from the plan that a run would make. The seconds are those of the machine's figures: every rank
takes its bytes over NVLink from ranks of its node, over the network from those of others, both at a time; it reads and
writes what is packed, cast and stored, and the fingerprint reads all once more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch

from gadcore.config.rollout import VLLMRollout
from gadcore.distributed.reshard import Layout, Mesh, Plan, make_plan
from gadcore.distributed.reshard_blocks import width
from gadcore.errors import UserError
from gadcore.plan.dimensions import read_config
from gadcore.plan.machine import Machine
from gadcore.plan.memory import Case


@dataclass(frozen=True)
class Resharding:
    """Of one sync; bytes of the rank with the most, seconds predicted but for plan_s, measured of one core.

    received: over the wire. minimum: the least that can be. gathered: were the whole model gathered instead. engine:
    of one rank's engine. network: of those received, from other nodes. buckets: exchanges one after the other.
    exchange_s, copy_s, fingerprint_s: they follow each other here, though the first two overlap.
    """

    ranks: int
    tensor_parallel: int
    received: int
    minimum: int
    gathered: int
    engine: int
    network: int
    pieces: int
    buckets: int
    plan_s: float
    exchange_s: float
    copy_s: float
    fingerprint_s: float

    @property
    def seconds(self) -> float:
        return self.exchange_s + self.copy_s + self.fingerprint_s


def of_case(case: Case) -> list[Resharding]:
    """For every number of ranks of a node that may share a sampler. UserError where there is no vLLM to ask."""
    # Imported only here: vLLM takes seconds to load.
    from gadcore.rollout.vllm_layout import layouts

    machine, mesh = case.machine, Mesh.even(case.shards, case.config.distributed.replicate)
    if machine.ranks == 1 or not isinstance(case.config.rollout, VLLMRollout):
        raise UserError(
            "plan.resharding = true is for several ranks whose sampler is vLLM in the same processes: name a machine "
            "that has more, or leave it out"
        )
    if case.policy.adapted:
        raise UserError(
            "plan.resharding = true counts what goes from shards to the samplers, and with student.adapter = lora each "
            "rank has all of the student and a sampler of its own: leave it out"
        )
    degrees = [k for k in (1, 2, 4, 8) if machine.per_node % k == 0 and case.student.heads % k == 0]
    dtypes = (getattr(torch, case.config.student.weights_dtype), getattr(torch, case.sampling_dtype))
    with TemporaryDirectory() as folder:
        read_config(case.student.name)[1].save_pretrained(folder)
        found = layouts(folder, mesh, degrees, trainer=dtypes[0], engine=dtypes[1])
        return [resharding(layout, degree, machine) for degree, layout in found]


def resharding(layout: Layout, tensor_parallel: int, machine: Machine) -> Resharding:
    """The prediction for a layout of as many ranks as the machine has."""
    start = time.process_time()
    plan = make_plan(layout)
    plan_s = time.process_time() - start
    figures, size = machine.figures, layout.mesh.size
    local, network = _by_link(plan, machine.per_node)
    share = figures["collective_share"]
    exchange = max(
        max(near / (figures["node_link"] * share), far / (figures["network_link"] * share))
        for near, far in zip(local, network, strict=True)
    )
    bandwidth = figures["memory_bandwidth"] * figures["memory_share"]
    engine = [kept + received for kept, received in zip(plan.kept, plan.received, strict=True)]
    shard = _shard_bytes(layout)
    # Read in the trainer's dtype, as wide as it is; packed, sent, unpacked, stored.
    wider = max(1.0, max(d.itemsize for d in layout.dtypes.values()) / min(d.itemsize for d in layout.stored.values()))
    copied = max(
        wider * (kept + sent) + kept + 3 * received + sent
        for kept, sent, received in zip(plan.kept, plan.sent, plan.received, strict=True)
    )
    # Bits are read by rows and by columns; the trainer's are cast before.
    looked = 2 * max(engine) + (1 + 3 / wider) * shard
    return Resharding(
        size,
        tensor_parallel,
        max(plan.received),
        max(plan.minimum),
        plan.gathered,
        max(engine),
        max(network),
        plan.pieces,
        sum(not bucket.idle for bucket in plan.buckets),
        plan_s,
        exchange,
        copied / bandwidth,
        looked / bandwidth,
    )


def _by_link(plan: Plan, per_node: int) -> tuple[list[int], list[int]]:
    """Bytes that every rank exchanges with its node, and with others: the larger of sent and received."""
    size = len(plan.moved)
    near, far = ([[0, 0] for _ in range(size)] for _ in range(2))
    for source, row in enumerate(plan.moved):
        for target, count in enumerate(row):
            if source != target:
                link = near if source // per_node == target // per_node else far
                link[source][0] += count
                link[target][1] += count
    return [max(both) for both in near], [max(both) for both in far]


def _shard_bytes(layout: Layout) -> int:
    """Of a rank's shard of the trainer's weights."""
    return sum(
        layout.mesh.chunk(shape[0] if shape else 1) * width(shape) * layout.dtypes[name].itemsize
        for name, shape in layout.shapes.items()
    )
