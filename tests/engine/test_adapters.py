"""vLLM with the student's adapter: the trainer's distribution after every update, in both places that it can lie in."""

from __future__ import annotations

import pytest
import torch

from gadcore.config.settings import Config
from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.distributed.world import ALONE, World
from gadcore.models.adapter import own_parameters
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from gadcore.rollout import vllm as vllm_engine
from gadcore.rollout.engine import SampleRequest, make_engine
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.weights import PlainWeights, fingerprint
from tests.support.adapters import merged, trained
from tests.support.builders import TEMPLATE, groups
from tests.support.engines import wake_with
from tests.support.ranks import run_ranks
from tests.support.tiny import save_tiny

RANK = 4


class Sampled:
    """A tiny student with an adapter, and a vLLM that samples from it."""

    def __init__(self, directory, kind: str, world: World = ALONE, **adapter) -> None:
        pytest.importorskip("vllm")
        path = str(directory if (directory / "config.json").exists() else save_tiny(directory, kind))
        self.config = Config.model_validate(
            {
                "data": {"max_prompt_tokens": 64, "max_response_tokens": 32},
                "rollout": {"group_size": 4, "max_num_seqs": 128},
                "algorithm": {"kl_coef": 0.0},
                "student": {"adapter": "lora", "adapter_rank": RANK, **adapter},
            }
        )
        spec = ModelSpec.resolve(path)
        self.student = Student.load(spec, self.config.student, self.config.algorithm, device="cpu", world=world)
        # What a run starts from somebody's adapter with.
        trained(self.student.model, 3)
        self.engine = make_engine(self.config, path, self.student.model, TEMPLATE, world=world)
        wake_with(self.engine, self.student.model)
        self.requests = [SampleRequest(g.prompt.token_ids, 4, 1000 + 10 * i) for i, g in enumerate(groups(5))]

    def greedy(self, engine) -> list[tuple[int, ...]]:
        return [r[0].token_ids for r in engine.generate(self.requests, temperature=0.0, max_tokens=24)]

    def step(self) -> None:
        self.student.seqkd_backward(groups(3))
        self.student.step(lr=3e-3)


# Adapters beside all layers, and beside some members of vLLM's fused layers. The slot is vLLM's own, which is CUDA's
# way: here it computes on the CPU.
CASES = {
    "products": ("llama", False, {}),
    "some products": ("qwen2", False, {"adapter_targets": "q_proj,v_proj,down_proj"}),
    "slot": ("qwen2", True, {}),
    "some of a slot": ("llama", True, {"adapter_targets": "q_proj,v_proj,down_proj"}),
    # vLLM has a copy of what the bits say, never of what they were made of.
    "four bits": ("qwen2", False, {"adapter_base": "nf4"}),
    "some of four bits": ("llama", False, {"adapter_base": "nf4", "adapter_targets": "q_proj,v_proj,down_proj"}),
    "some of eight bits in a slot": (
        "llama",
        True,
        {"adapter_base": "int8", "adapter_targets": "q_proj,v_proj,down_proj"},
    ),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=pytest.mark.by_hand if "some" in case else ()) for case in CASES],
)
def sampled(request, tmp_path_factory):
    kind, slot, adapter = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if slot:
            patch.setattr(vllm_engine, "in_slots", lambda on_cpu: True)
        made = Sampled(tmp_path_factory.mktemp("model"), kind, **adapter)
    yield made
    made.engine.close()


def test_three_updates_give_the_trainers_distribution(sampled) -> None:
    """Greedy as Hugging Face with the adapter, and log-probs as the trainer's, without a reload of anything."""
    trainer = HFEngine(sampled.config, "", sampled.student.model, TEMPLATE)
    before: list = []
    for _ in range(4):
        greedy = sampled.greedy(sampled.engine)
        # Cached keys and values of the last weights would show here.
        assert greedy == sampled.greedy(trainer) != before
        before = greedy
        drawn = sampled.engine.generate(sampled.requests, temperature=0.8, max_tokens=24)
        differences = []
        for request, samples in zip(sampled.requests, drawn, strict=True):
            tokens = GroupTokens(request.prompt_ids, tuple(sample.token_ids for sample in samples))
            with torch.no_grad():
                ours = sampled.student.logprobs(
                    sampled.student.model, GroupedBatch.of([tokens], last_tokens=False), 0.8
                )
            differences.append((ours - torch.tensor([p for sample in samples for p in sample.logprobs])).abs())
        found = torch.cat(differences)
        assert found.max() <= 1e-3 and found.mean() <= 1e-4
        sampled.step()
        sampled.engine.update_weights(PlainWeights(sampled.student.model))


@pytest.mark.native
def test_a_layer_of_a_decoding_step_is_one_call_with_its_adapters_too(sampled) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        longest = max(map(len, sampled.greedy(sampled.engine)))
    calls = {event.key: event.count for event in profile.key_averages()}
    # The first token comes from the prompt's step. vLLM's own adapters hang on modules that it calls.
    steps = 0 if sampled.engine.adapter.request else longest - 1
    assert longest > 1 and calls.get("gadcore::cpu_decode_layer", 0) == 2 * steps


def test_the_adapter_is_the_trainers_and_the_base_is_one(sampled) -> None:
    sampled.step()
    sampled.engine.update_weights(PlainWeights(sampled.student.model))
    ours, theirs = dict(PlainWeights(sampled.student.model)), sampled.engine.weights()
    assert ours.keys() == theirs.keys()
    adapter = sampled.engine.adapter
    held = {name: adapter.as_held(name, p.detach()) for name, p in ours.items()}
    assert fingerprint(held.items()) == fingerprint(theirs.items())
    own = own_parameters(sampled.student.model)
    for name, p in ours.items():
        if (name not in own or adapter.shared) and sampled.engine.shared:
            assert p.data_ptr() == theirs[name].data_ptr(), name
    # Without the adapter it would say something else.
    plain = merged(sampled.student.model)
    base = {name: p for name, p in ours.items() if name not in own}
    assert any(not torch.equal(p, base[name]) for name, p in plain.named_parameters())


def test_an_adapter_that_does_not_come_is_told(sampled) -> None:
    class Without(PlainWeights):
        def __iter__(self):
            return ((name, tensor) for name, tensor in super().__iter__() if not name.endswith("lora_B"))

    with pytest.raises(RuntimeError, match="has not the adapters that vLLM computes with: .*lora_B"):
        sampled.engine.update_weights(Without(sampled.student.model))
    sampled.engine.update_weights(PlainWeights(sampled.student.model))


def on_rank(world: World, directory, slot: bool, adapter: dict) -> dict:
    """What a rank draws between updates, and what Hugging Face does with its adapter."""
    with pytest.MonkeyPatch.context() as patch:
        if slot:
            patch.setattr(vllm_engine, "in_slots", lambda on_cpu: True)
        found = Sampled(directory, "", world, **adapter)
    trainer = HFEngine(found.config, "", found.student.model, TEMPLATE)
    rounds = []
    for _ in range(3):
        drawn = found.engine.generate(found.requests, temperature=0.8, max_tokens=24)
        own = [sample.token_ids for samples in drawn for sample in samples]
        rounds.append((own, found.greedy(found.engine), found.greedy(trainer)))
        found.step()
        found.engine.update_weights(PlainWeights(found.student.model))
    shared = found.engine.shared
    found.engine.close()
    return {"rounds": rounds, "shared": shared}


@pytest.mark.by_hand
@pytest.mark.timeout(1700)
@pytest.mark.parametrize(
    ("kind", "slot", "adapter"),
    [("llama", False, {}), ("qwen2", True, {}), ("qwen2", False, {"adapter_base": "nf4"})],
)
def test_two_samplers_draw_what_one_process_draws(tmp_path, kind, slot, adapter) -> None:
    """Each on a rank of its own, over the base and the adapter that lie there."""
    save_tiny(tmp_path, kind)
    one, *two = (
        found
        for size in (1, 2)
        for found in run_ranks(size, f"{__name__}:on_rank", tmp_path, slot, adapter, deadline=800)
    )
    for rank in two:
        assert rank["rounds"] == one["rounds"]
        # The base; vLLM's slot has A and B of its own.
        assert rank["shared"] == one["shared"] == (not adapter)
        rounds = [greedy for _, greedy, _ in rank["rounds"]]
        assert rounds == [expected for *_, expected in rank["rounds"]]
        assert rounds[0] != rounds[1] != rounds[2], "the steps were too small to be seen"
