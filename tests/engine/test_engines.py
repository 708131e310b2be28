"""All engines: exact weights after updates, log-probs, seeds, end markers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from gadcore.config.settings import Config
from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.models.loading import load_causal_lm
from gadcore.models.student import Student
from gadcore.rollout.engine import SampleRequest, make_engine
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.server import ServerEngine
from gadcore.rollout.vllm import VLLMEngine
from gadcore.rollout.weights import PlainWeights, fingerprint
from tests.support.builders import TEMPLATE, groups
from tests.support.engines import wake_with
from tests.support.reads import device_reads
from tests.support.tiny import save_tiny

VARIANTS = [("llama", True), ("llama", False), ("qwen2", True)]


def make_config(engine: str, dtype: str = "float32") -> Config:
    own = {"dtype": dtype, "max_num_seqs": 128} if engine != "hf" else {}
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 32},
            "rollout": {"engine": engine, "group_size": 4, **own},
            "algorithm": {"kl_coef": 0.0},
        }
    )


class Sampled:
    """A tiny student with an engine that samples from it."""

    def __init__(self, directory, engine: str, kind: str, tied: bool) -> None:
        pytest.importorskip("vllm") if engine != "hf" else None
        config = make_config(engine)
        path = str(save_tiny(directory, kind, tied=tied))
        self.model = load_causal_lm(path, "float32", torch.device("cpu"))
        self.engine = make_engine(config, path, self.model, TEMPLATE)
        wake_with(self.engine, self.model)
        self.student = Student(self.model, config.student, config.algorithm, temperature=0.8, micro_batch_tokens=4096)
        self.requests = [SampleRequest(g.prompt.token_ids, 4, 1000 + 10 * i) for i, g in enumerate(groups(5))]

    def optimizer_step(self) -> None:
        self.student.seqkd_backward(groups(3))
        self.student.step(lr=3e-3)
        self.engine.update_weights(PlainWeights(self.model))


ENGINES = [("hf", *VARIANTS[0]), *(("vllm", *v) for v in VARIANTS), ("vllm-server", "qwen2", True)]


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def sampled(request, tmp_path_factory):
    made = Sampled(tmp_path_factory.mktemp("model"), *request.param)
    yield made
    made.engine.close()


def test_greedy_equals_hugging_face_after_two_optimizer_steps(sampled) -> None:
    reference = HFEngine(make_config("hf"), "", sampled.model, TEMPLATE)
    outputs = []
    for _ in range(3):
        ours = sampled.engine.generate(sampled.requests, temperature=0.0, max_tokens=24)
        theirs = reference.generate(sampled.requests, temperature=0.0, max_tokens=24)
        assert [[r.token_ids for r in g] for g in ours] == [[r.token_ids for r in g] for g in theirs]
        outputs.append([g[0].token_ids for g in ours])
        sampled.optimizer_step()
    assert outputs[0] != outputs[1] != outputs[2], "the steps were too small to be seen"


def test_engine_holds_the_trainers_weights_to_the_bit(sampled) -> None:
    if isinstance(sampled.engine, ServerEngine):
        pytest.skip("they are in another process, which compares a fingerprint: test_server.py")
    before = fingerprint(sampled.engine.weights().items())
    sampled.optimizer_step()
    trainer = {n: p.detach().clone() for n, p in sampled.model.named_parameters()}
    weights = sampled.engine.weights()
    assert weights.keys() == trainer.keys()
    assert all(torch.equal(weights[n], trainer[n]) for n in trainer)
    assert before != fingerprint(weights.items()) == fingerprint(trainer.items())


@pytest.mark.native
def test_vllms_layers_are_shorter(sampled) -> None:
    # Else what the other tests compare is vLLM's own.
    if isinstance(sampled.engine, VLLMEngine):
        assert all("forward" in vars(layer) for layer in sampled.engine.engine_model.model.layers)


def test_sampler_logprobs_are_the_trainers(sampled) -> None:
    drawn = sampled.engine.generate(sampled.requests, temperature=0.8, max_tokens=24)
    differences = []
    for request, samples in zip(sampled.requests, drawn, strict=True):
        tokens = GroupTokens(request.prompt_ids, tuple(s.token_ids for s in samples))
        batch = GroupedBatch.of([tokens], last_tokens=False)
        with torch.no_grad():
            logprob = sampled.student.logprobs(sampled.model, batch, 0.8)
        differences.append((logprob - torch.tensor([lp for s in samples for lp in s.logprobs])).abs())
    difference = torch.cat(differences)
    assert difference.max() < 1e-3 and difference.mean() < 1e-4


def test_seed_alone_decides_a_prompts_samples(sampled) -> None:
    def ids(drawn):
        return [[s.token_ids for s in group] for group in drawn]

    together = ids(sampled.engine.generate(sampled.requests, temperature=0.8, max_tokens=24))
    backwards = ids(sampled.engine.generate(sampled.requests[::-1], temperature=0.8, max_tokens=24))[::-1]
    alone = ids(sampled.engine.generate(sampled.requests[:1], temperature=0.8, max_tokens=24))
    assert together == backwards and together[:1] == alone
    assert all(len(set(group)) > 1 for group in together), "the samples of a group must differ"
    other = [SampleRequest(r.prompt_ids, r.n, r.seed + 77) for r in sampled.requests]
    assert ids(sampled.engine.generate(other, temperature=0.8, max_tokens=24)) != together


def test_every_request_is_told_of_when_it_is_finished(sampled) -> None:
    for _ in range(2):
        told: dict = {}
        drawn = sampled.engine.generate(sampled.requests, temperature=0.8, max_tokens=24, done=told.__setitem__)
        assert told == dict(enumerate(drawn))


def test_more_prompt_tokens_than_fit_into_one_batch_change_nothing(sampled) -> None:
    """vLLM computes at most a few thousand prompt tokens at a time, and used to cut the prompt at the border."""
    prompt = (sampled.requests[0].prompt_ids * 60)[:60]
    requests = [SampleRequest((10 + i, *prompt), 1, i) for i in range(150)]
    drawn = sampled.engine.generate(requests, temperature=0.8, max_tokens=3)
    for i in (0, 40, 80, 149):
        ((alone,),) = sampled.engine.generate(requests[i : i + 1], temperature=0.8, max_tokens=3)
        assert alone.token_ids == drawn[i][0].token_ids


def test_responses_end_at_the_marker_or_at_the_limit(sampled) -> None:
    requests = [replace(request, seed=seed) for seed in range(8) for request in sampled.requests]
    drawn = sampled.engine.generate(requests, temperature=1.5, max_tokens=24)
    responses = [s for group in drawn for s in group]
    for sample in responses:
        assert sample.finished == (sample.token_ids[-1] == TEMPLATE.end_id)
        assert sample.finished or len(sample.token_ids) == 24
        assert TEMPLATE.end_id not in sample.token_ids[:-1]
        assert len(sample.logprobs) == len(sample.token_ids)
        assert sample.text == TEMPLATE.text_of(sample.token_ids)[0]
    assert {s.finished for s in responses} == {True, False}


def test_update_after_the_views_were_lost_is_an_error(sampled) -> None:
    if isinstance(sampled.engine, ServerEngine):
        pytest.skip("it has none")
    if isinstance(sampled.engine, HFEngine):
        with pytest.raises(RuntimeError, match="was built with"):
            sampled.engine.update_weights(PlainWeights(copy.deepcopy(sampled.model)))
        return
    name, p = next(iter(sampled.model.named_parameters()))
    view = p.data
    p.data = p.data.clone()
    with pytest.raises(RuntimeError, match=name):
        sampled.engine.update_weights(PlainWeights(sampled.model))
    p.data = view


def test_unshared_weights_are_copied_and_cast(tmp_path) -> None:
    """Trainer fp32, engine bf16, as on a GPU: the update copies into vLLM's own storage."""
    pytest.importorskip("vllm")
    path = str(save_tiny(tmp_path))
    model = load_causal_lm(path, "float32", torch.device("cpu"))
    config = make_config("vllm", dtype="bfloat16")
    engine = make_engine(config, path, model, TEMPLATE)
    assert not engine.shared
    assert not any("forward" in vars(layer) for layer in engine.engine_model.model.layers), "those are of float32"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(RuntimeError, match="sleeps"):
        engine.update_weights(PlainWeights(model))
    wake_with(engine, model)
    assert all(torch.equal(engine.weights()[n], p.bfloat16()) for n, p in model.named_parameters())
    with device_reads() as reads:
        engine.update_weights(PlainWeights(model))
    assert reads == {"equal": 1}, "the proof that all weights arrived is one read"
    engine.close()


def test_fingerprint_sees_every_kind_of_change() -> None:
    base = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}
    changed = [
        {**base, "a": base["a"][[1, 0, 2, 3]]},
        {**base, "a": base["a"].nextafter(base["a"] + 1)},
        {"a": base["a"], "c": base["b"]},
        {**base, "b": -base["b"]},
    ]
    copies = [(name, tensor.clone()) for name, tensor in reversed(base.items())]
    assert fingerprint(copies) == fingerprint(base.items())
    assert len({fingerprint(c.items()) for c in [base, *changed]}) == 5
