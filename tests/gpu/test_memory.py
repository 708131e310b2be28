"""What only a GPU can prove of the memory states: page-locked copies, vLLM's sleep levels, the driver's own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gadcore.config.settings import Config, MemorySettings
from gadcore.errors import UserError
from gadcore.memory.arena import Arena
from gadcore.memory.colocation import Colocation
from gadcore.memory.meter import CudaMeter
from gadcore.memory.tiers import PinnedTier
from tests.support.builders import TEMPLATE
from tests.support.runs import assert_same_run, run, tiny_arguments
from tests.support.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIB = 2**20


def pinned(size: int) -> PinnedTier:
    return PinnedTier(torch.device("cuda"), "student.parameters", size)


def test_page_locked_copies_keep_every_bit_while_the_device_computes() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    held = [torch.randn(n, generator=generator, device="cuda") for n in (1, 1000, 64 * MIB // 4)]
    arena = Arena("student.parameters", held, pinned)
    arena.come()
    busy = torch.randn(2048, 2048, device="cuda")
    for round_ in range(3):
        # Written on the current stream, without waiting: the copy must.
        for tensor in held:
            tensor.add_(1)
        expected = [tensor.clone() for tensor in held]
        arena.changed()
        arena.leave()
        assert all(torch.equal(v.cpu(), e.cpu()) for (_, v), e in zip(arena.readable(), expected, strict=True))
        if round_:
            arena.come_soon()
        for _ in range(20):
            busy = busy @ busy / 2048
        arena.come()
        assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_leaving_frees_the_devices_memory() -> None:
    meter = CudaMeter(torch.device("cuda"))
    held = [torch.ones(512 * MIB // 4, device="cuda")]
    arena = Arena("student.optimizer", held, pinned)
    arena.come()
    meter.give_back()
    before = meter.in_use()
    arena.leave()
    meter.give_back()
    assert meter.in_use() <= before - 500 * MIB
    arena.come()
    assert meter.in_use() >= before - 16 * MIB


def test_a_limit_is_told_before_the_device_runs_out() -> None:
    class NoEngine:
        def sleep(self) -> None: ...
        def wake(self, part: str) -> None: ...
        def held(self) -> dict:
            return {}

    settings = MemorySettings(offload="pinned", limit_gib=0.1)
    memory = Colocation(torch.device("cuda"), settings, Path(), NoEngine(), shared=False)
    held = [torch.ones(256 * MIB // 4, device="cuda")]
    memory.add("student.parameters", lambda: held)
    memory.enter("rest")
    with pytest.raises(UserError, match="state student needs .* of 0.10 GiB allowed"):
        memory.enter("student")
    with pytest.raises(UserError, match="out of memory in state"), memory.explained():
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")


def test_sleep_level_2_loses_weights_and_an_update_brings_the_trainers(tmp_path) -> None:
    pytest.importorskip("vllm")
    from gadcore.models.loading import load_causal_lm
    from gadcore.rollout.engine import SampleRequest, make_engine
    from tests.support.engines import wake_with

    path = str(save_tiny(tmp_path))
    model = load_causal_lm(path, "float32", torch.device("cuda"))
    config = Config.model_validate(
        {
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 32},
            "rollout": {"dtype": "float32", "gpu_memory_utilization": 0.1},
        }
    )
    engine = make_engine(config, path, model, TEMPLATE)
    requests = [SampleRequest((5, 6, 7, 8), 1, 0)]

    def greedy() -> list[tuple[int, ...]]:
        wake_with(engine, model)
        drawn = engine.generate(requests, temperature=0.0, max_tokens=16)
        engine.sleep()
        return [group[0].token_ids for group in drawn]

    first = greedy()
    assert engine.held() == {"engine.weights": 0, "engine.kv_cache": 0}
    assert greedy() == first, "sleeping and waking changed greedy output"
    with pytest.raises(RuntimeError, match="has slept"):
        engine.generate(requests, temperature=0.0, max_tokens=4)
    # CUDA graphs, captured before, compute with what was written since.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    wake_with(engine, model)
    ((sample,),) = engine.generate(requests, temperature=0.8, max_tokens=16)
    ids = torch.tensor([[*requests[0].prompt_ids, *sample.token_ids]], device="cuda")
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, 3:-1] / 0.8
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, 4:, None])[:, 0].cpu()
    torch.testing.assert_close(torch.tensor(sample.logprobs), logprobs, rtol=0, atol=1e-3)
    engine.sleep()
    engine.close()


def test_a_run_with_pinned_holdings_is_the_run_without(tmp_path) -> None:
    for offload in ("none", "pinned"):
        done = run([*tiny_arguments(tmp_path), "--memory.offload", offload, "--run.dir", offload], tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "pinned", tmp_path / "none")
    memory = json.loads((tmp_path / "pinned/summary.json").read_text())["memory"]
    assert "discriminator.optimizer" not in memory["states"]["student"]
    for model in ("student", "discriminator"):
        assert f"{model}.optimizer" not in memory["states"][model], "beside activations there are no moments"


def test_host_memory_that_is_registered_is_exact_and_page_locked() -> None:
    tier = pinned(33 * MIB)
    assert tier.readable().is_pinned() and tier.readable().nbytes == 33 * MIB
    buffer = torch.randint(0, 256, (33 * MIB,), dtype=torch.uint8, device="cuda")
    tier.store(buffer, 0)
    back = torch.empty_like(buffer)
    tier.start_load(back)
    tier.stop_load()
    assert torch.equal(back, buffer) and torch.equal(tier.readable(), buffer.cpu())
    tier.close()


def test_a_load_that_is_not_followed_is_given_back() -> None:
    meter = CudaMeter(torch.device("cuda"))
    held = [torch.ones(512 * MIB // 4, device="cuda")]
    arena = Arena("student.optimizer", held, pinned)
    meter.give_back()
    before = meter.in_use()
    arena.come_soon()
    assert meter.in_use() >= before + 500 * MIB
    arena.not_yet()
    meter.give_back()
    assert meter.in_use() <= before + 16 * MIB
    arena.come()
    assert (held[0] == 1).all()


def test_a_hand_over_takes_no_second_copy() -> None:
    held = [torch.ones(64 * MIB // 4, device="cuda") for _ in range(16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Arena("student.optimizer", held, pinned)
    assert torch.cuda.max_memory_allocated() <= before + MIB
    assert torch.cuda.memory_allocated() <= before - 1000 * MIB
