"""A run of adapters on the stand-in GPU, its base in 8 bits: vLLM's slot from load to sync, the base away meanwhile."""

from __future__ import annotations

import json

from bench.offline import vllm_standin
from bench.offline.cuda_standin import gpu
from gadcore.run import main
from tests.rehearsal.test_run import GIB, MIB, arguments
from tests.support.runs import records


def test_a_run_of_adapters_on_a_base_in_few_bits(tmp_path) -> None:
    adapters = {
        f"{owner}__{name}": value
        for owner in ("student", "discriminator")
        for name, value in (("adapter", "lora"), ("adapter_rank", 4), ("adapter_base", "int8"))
    }
    with gpu(80 * GIB, context=512 * MIB) as device, vllm_standin.installed():
        # What there is room for would come ahead.
        assert main(arguments(tmp_path, memory__prefetch="false", schedule__gad_steps=1, **adapters)) == 0
        assert device.allocator.allocated < 4 * MIB
    rows = records(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["warmup", "gad"]
    # The sampler computes in bfloat16 what the trainer computes under autocast, with A and B as they are after a step.
    assert all(0 < row["sampler/logprob_diff_mean"] < 0.1 for row in rows[1:])
    states = json.loads((tmp_path / "run/summary.json").read_text())["memory"]["states"]
    held = {state: there.get("base.parameters", 0) for state, there in states.items()}
    assert held.pop("rollout") == 0 and len(set(held.values())) == 1 and min(held.values()) > 0
