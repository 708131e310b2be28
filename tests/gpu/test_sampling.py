"""What only GPUs can prove of sampling: shards over NCCL into vLLM's, CUDA's handles, and a server on another GPU."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from gadcore.config.settings import Config
from gadcore.distributed.reshard import Layout, make_plan, mesh_of
from gadcore.distributed.reshard_blocks import find_blocks
from gadcore.distributed.reshard_exchange import Exchange
from gadcore.distributed.world import ALONE, World
from gadcore.rollout.engine import make_engine
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.server_process import ServerProcess, arguments, environment
from gadcore.rollout.weights import PlainWeights
from tests.engine.test_engine_over_ranks import UPDATES, Trainer, requests, tokens
from tests.support.builders import TEMPLATE
from tests.support.ranks import run_ranks
from tests.support.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HERE = "tests.gpu.test_sampling"
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# The kernels of attention take heads of 64 and more.
HEAD = 64


def config_of(**rollout) -> Config:
    own = {"engine": "vllm-server", "group_size": 4, "enforce_eager": True, "gpu_memory_utilization": 0.2, **rollout}
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 24},
            "rollout": own,
            "algorithm": {"kl_coef": 0.0},
        }
    )


@TWO
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_shards_arrive_over_nccl(tmp_path, tensor_parallel: int) -> None:
    path = str(save_tiny(tmp_path, "qwen2", kv_heads=2, head_dim=HEAD))
    ranks = run_ranks(
        2, "tests.engine.test_engine_over_ranks:sampled", path, tensor_parallel, "float32", "cuda",
        device="cuda", deadline=600,
    )  # fmt: skip
    for at, rank in enumerate(ranks):
        assert [r["greedy"] for r in rank["rounds"]] == [r["expected"] for r in rank["rounds"]]
        assert {r["moved"] for r in rank["rounds"]} == {(rank["sent"], rank["minimum"][at])}
        assert "differ from the trainer's after an update" in rank["fingerprint"]
        assert "the probe of sync 3" in rank["stale"] and rank["mended"] == ""


def timed(world: World) -> dict:
    """Seconds of a push of 8 layers of a 7B's sizes, all at once and bucket by bucket."""
    from torch.distributed.fsdp import fully_shard

    made = torch.nn.Module()
    made.weights = torch.nn.ParameterList(torch.empty(18944, 3584, device="cuda") for _ in range(8))
    fully_shard(made, mesh=world.mesh)
    trainers = dict(made.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in trainers.items()}
    engine = {n: torch.empty(s[0], s[1] // world.size, dtype=torch.bfloat16, device="cuda") for n, s in shapes.items()}

    def load(weights) -> None:
        for name, value in weights:
            columns = engine[name].shape[1]
            engine[name].copy_(value[:, world.rank * columns : (world.rank + 1) * columns])

    blocks = world.all_gather_objects(find_blocks(load, engine, shapes))
    (mesh,) = {mesh_of(p, name) for name, p in trainers.items()}
    narrow = dict.fromkeys(shapes, torch.bfloat16)
    layout = Layout(mesh, shapes, dict.fromkeys(shapes, torch.float32), narrow, blocks)
    found = {}
    for bucket_bytes in (64 << 20, 1 << 40):
        exchange = Exchange(make_plan(layout, world.rank, bucket_bytes=bucket_bytes), engine)
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            moved = exchange.push([(name, p.detach()) for name, p in trainers.items()])
            torch.cuda.synchronize()
            found[bucket_bytes] = (time.perf_counter() - start, moved.received)
    return found


@TWO
def test_buckets_overlap(capsys) -> None:
    for found in run_ranks(2, f"{HERE}:timed", device="cuda", deadline=300):
        (buckets, received), (whole, _) = found.values()
        with capsys.disabled():
            print(f"{received / 1e9:.2f} GB received: {buckets:.3f} s in buckets, {whole:.3f} s at once")
        assert buckets < 1.2 * whole


def follows(engine, trainer: Trainer) -> None:
    """Greedy text is Hugging Face's after every update."""
    reference = HFEngine(config_of(), "", trainer.whole, TEMPLATE)
    sampler = Sampler(engine, PlainWeights(trainer.model), temperature=0.8, max_tokens=24)
    for _ in range(UPDATES):
        trainer.step()
        sampler.generate(requests(2))
        engine.wake("weights")
        engine.update_weights(PlainWeights(trainer.model))
        engine.wake("kv_cache")
        ours = engine.generate(requests(), temperature=0.0, max_tokens=24)
        assert tokens(ours) == tokens(reference.generate(requests(), temperature=0.0, max_tokens=24))
        engine.sleep()


def test_a_server_of_our_own_takes_handles_of_cudas_memory(tmp_path) -> None:
    path = str(save_tiny(tmp_path, "qwen2", head_dim=HEAD))
    trainer = Trainer(path, ALONE, "cuda")
    engine = make_engine(config_of(), path, trainer.model, TEMPLATE)
    follows(engine, trainer)
    engine.close()


@TWO
def test_a_server_on_another_gpu_takes_weights_over_nccl(tmp_path, monkeypatch) -> None:
    path = str(save_tiny(tmp_path, "qwen2", head_dim=HEAD))
    monkeypatch.setenv("GADCORE_SERVER_TOKEN", "of-the-test")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = config_of(url=f"http://127.0.0.1:{port}")
    command = arguments(config, path, device="cuda", backend="nccl")
    variables = environment(config.rollout, "of-the-test", "nccl") | {"CUDA_VISIBLE_DEVICES": "1"}
    server = ServerProcess(command, variables, port)
    trainer = Trainer(path, ALONE, "cuda")
    engine = make_engine(config, path, trainer.model, TEMPLATE)
    follows(engine, trainer)
    engine.close()
    server.close()
