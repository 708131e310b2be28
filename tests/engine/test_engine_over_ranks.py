"""vLLM on the trainer's two ranks, one sampler over both (tensor parallelism) or two beside each other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from gadcore.config.settings import Config
from gadcore.data.groups import Group
from gadcore.distributed.fsdp import reshard_all
from gadcore.distributed.reshard import Mesh, make_plan
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.models.loading import load_causal_lm
from gadcore.rollout.engine import SampleRequest, make_engine
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.probe import Probe
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.vllm_layout import layouts
from gadcore.rollout.vllm_shards import ShardedWeights
from gadcore.rollout.weights import PlainWeights
from tests.support.builders import TEMPLATE, groups
from tests.support.ranks import run_ranks
from tests.support.tiny import save_tiny, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1700)]
HERE = "tests.engine.test_engine_over_ranks"
UPDATES = 3


def config_of(engine: str = "vllm", **rollout) -> Config:
    own = {"max_num_seqs": 64, **rollout} if engine == "vllm" else {}
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 24},
            "rollout": {"engine": engine, "group_size": 4, **own},
            "algorithm": {"kl_coef": 0.0},
        }
    )


def requests(count: int = 5) -> list[SampleRequest]:
    return [SampleRequest(g.prompt.token_ids, 4, 1000 + 10 * i) for i, g in enumerate(groups(count))]


def tokens(drawn) -> list:
    return [[response.token_ids for response in group] for group in drawn]


class Trainer:
    """A sharded model that changes as an optimizer's step would change it, and the same whole one beside it."""

    def __init__(self, path: str, world: World, device: str = "cpu") -> None:
        self.world, self.seed = world, 0
        self.whole, self.model = (load_causal_lm(path, "float32", torch.device(device)) for _ in range(2))
        if world.size > 1:
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=world.mesh)
            fully_shard(self.model, mesh=world.mesh)

    @torch.no_grad()
    def step(self) -> None:
        self.seed += 1
        made = torch.Generator().manual_seed(self.seed)
        sharded = dict(self.model.named_parameters())
        for name, p in self.whole.named_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=made).to(p.device))
            local = sharded[name].to_local() if self.world.size > 1 else sharded[name]
            chunk = -(-len(p) // self.world.shards)
            local.copy_(p[self.world.shard * chunk :][: len(local)])

    def score(self, groups: list[Group]) -> list:
        """Log-probs of samples, by the sharded model."""
        found = []
        for group in groups:
            rows = []
            for sample in group.samples:
                ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]], device=self.whole.device)
                logits = self.model(ids, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1] / 0.8
                rows.append(logits.log_softmax(-1).gather(-1, ids[0, len(group.prompt.token_ids) :, None])[:, 0])
            found.append(rows)
        reshard_all(self.model)
        return found


def error_of(call, *args, **kwargs) -> str:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def sampled(world: World, path: str, tensor_parallel: int, dtype: str, device: str = "cpu") -> dict:
    """What a rank has seen over some updates, and what is said of updates that do not arrive."""
    start = time.perf_counter()
    config = config_of(tensor_parallel=tensor_parallel, dtype=dtype)
    trainer = Trainer(path, world, device)
    engine = make_engine(config, path, trainer.model, TEMPLATE, world=world)
    reference = HFEngine(config_of("hf"), "", trainer.whole, TEMPLATE)
    sync: ShardedWeights = engine.sync
    found: dict = {"started_s": time.perf_counter() - start, "shared": engine.shared, "rounds": []}
    plan = sync.plan
    found |= {"minimum": plan.minimum, "gathered": plan.gathered, "sent": plan.sent[world.rank]}
    sampler = Sampler(engine, PlainWeights(trainer.model), temperature=0.8, max_tokens=24)
    for _ in range(UPDATES):
        trainer.step()
        drawn = sampler.generate(requests())
        engine.wake("weights")
        engine.update_weights(PlainWeights(trainer.model))
        engine.wake("kv_cache")
        greedy = engine.generate(requests(), temperature=0.0, max_tokens=24)
        expected = reference.generate(requests(), temperature=0.0, max_tokens=24)
        engine.sleep()
        moved = sync.moved
        found["rounds"].append(
            {
                "sampled": tokens(drawn), "logprobs": [r.logprobs for g in drawn for r in g],
                "greedy": tokens(greedy), "expected": tokens(expected),
                "moved": (moved.sent, moved.received),
            }
        )  # fmt: skip
    told: dict = {}
    drawn = Sampler(engine, PlainWeights(trainer.model), temperature=0.8, max_tokens=4).generate(
        requests(3), told.__setitem__
    )
    found["told"] = told == dict(enumerate(drawn))
    found["held"] = engine.held()
    found |= without_updates(trainer, engine, dtype)
    engine.close()
    ((_, planned),) = layouts(path, Mesh.of(world.mesh), [tensor_parallel], trainer=torch.float32, engine=torch.float32)
    found["planned"] = planned.blocks == sync._layout.blocks and make_plan(planned, world.rank) == plan
    return found


def without_updates(trainer: Trainer, engine, dtype: str) -> dict:
    """What fingerprint and probe say where the weights do not arrive."""
    sync, found = engine.sync, {}
    probed = Sampler(
        engine, PlainWeights(trainer.model), temperature=0.8, max_tokens=24,
        probe=Probe(trainer.score, every=2, dtype=dtype),
    )  # fmt: skip
    found["probe"] = error_of(probed.generate, requests())
    trainer.step()
    kept, sync._exchange = sync._exchange, type("Skips", (), {"push": lambda self, weights: None})()
    found["fingerprint"] = error_of(probed.generate, requests())
    engine.sleep()
    update, sync.update = sync.update, lambda weights: None
    # The second sync is no probe's, the third one is.
    found["between"] = error_of(probed.generate, requests())
    found["stale"] = error_of(probed.generate, requests())
    sync.update, sync._exchange = update, kept
    engine.sleep()
    probed.generate(requests())
    found["mended"] = error_of(probed.generate, requests())
    return found


def refusals(world: World, path: str) -> dict:
    """Settings that do not fit two processes: before anything starts."""
    trainer = Trainer(path, ALONE)

    return {"degree": error_of(make_engine, config_of(tensor_parallel=3), path, trainer.model, TEMPLATE, world=world)}


def both(world: World, path: str) -> dict:
    return {"refused": refusals(world, path), "sampled": sampled(world, path, 2, "float32")}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    pytest.importorskip("vllm")
    # Two key heads, so that there is one a rank.
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2", kv_heads=2)


@pytest.fixture(scope="module")
def over_both(path: Path) -> list[dict]:
    return run_ranks(2, f"{HERE}:both", str(path), deadline=1500)


@pytest.fixture(scope="module")
def ranks(over_both) -> list[dict]:
    return [found["sampled"] for found in over_both]


def test_greedy_equals_hugging_face_on_every_rank_after_every_update(ranks) -> None:
    for rank in ranks:
        assert not rank["shared"] and rank["told"]
        rounds = [r["greedy"] for r in rank["rounds"]]
        assert rounds == [r["expected"] for r in rank["rounds"]]
        assert rounds[0] != rounds[1] != rounds[2], "the steps were too small to be seen"


def test_every_rank_has_all_samples(ranks) -> None:
    assert ranks[0]["rounds"][0]["sampled"] == ranks[1]["rounds"][0]["sampled"]
    assert [r["sampled"] for r in ranks[0]["rounds"]] == [r["sampled"] for r in ranks[1]["rounds"]]


def test_bytes_are_the_fewest(ranks) -> None:
    for at, rank in enumerate(ranks):
        assert {r["moved"] for r in rank["rounds"]} == {(rank["sent"], rank["minimum"][at])}
        assert 0 < rank["minimum"][at] < rank["gathered"] / 2


def test_a_plan_on_the_meta_device_is_the_plan_of_the_run(ranks) -> None:
    assert all(rank["planned"] for rank in ranks)


def test_updates_that_are_left_out_are_noticed(ranks) -> None:
    for rank in ranks:
        assert rank["probe"] == ""
        assert "vLLM's weights differ from the trainer's after an update, in" in rank["fingerprint"]
        assert rank["between"] == ""
        assert rank["stale"].startswith("UserError: the probe of sync 3: ")
        assert "by the sampler and of" in rank["stale"] and "float32 explains 0.01" in rank["stale"]
        assert rank["mended"] == ""
        assert rank["held"] == {"engine.weights": 0, "engine.kv_cache": 0}


def test_what_does_not_fit_the_processes_is_refused(over_both) -> None:
    for rank in over_both:
        assert "rollout.tensor_parallel = 3 does not divide the 2 processes of a node" in rank["refused"]["degree"]
    with pytest.raises(UserError, match="does not divide the 1 processes"):
        make_engine(config_of(tensor_parallel=2), "", tiny_model(), TEMPLATE)


@pytest.mark.by_hand
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_two_samplers_draw_what_one_process_draws(tmp_path: Path, kind: str) -> None:
    path = str(save_tiny(tmp_path, kind, kv_heads=2))
    two = run_ranks(2, f"{HERE}:sampled", path, 1, "float32", deadline=1500)
    trainer = Trainer(path, ALONE)
    engine = make_engine(config_of(), path, trainer.model, TEMPLATE)
    sampler = Sampler(engine, PlainWeights(trainer.model), temperature=0.8, max_tokens=24)
    for at in range(UPDATES):
        trainer.step()
        drawn = sampler.generate(requests())
        for rank in two:
            assert rank["rounds"][at]["sampled"] == tokens(drawn)
            assert rank["rounds"][at]["greedy"] == rank["rounds"][at]["expected"]
    engine.close()
