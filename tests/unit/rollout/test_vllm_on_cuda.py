"""VLLMEngine on CUDA, with stand-ins for vLLM and the GPU: in what order vLLM is asked, and what it holds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.offline.cuda_standin import gpu
from bench.offline.cuda_standin.tensors import Tensors
from bench.offline.vllm_standin import LLM, installed
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.errors import UserError
from gadcore.models.loading import load_causal_lm
from gadcore.rollout.engine import SampleRequest, make_engine
from gadcore.rollout.vllm import VLLMEngine
from gadcore.rollout.weights import PlainWeights
from tests.support.builders import TEMPLATE
from tests.support.engines import wake_with
from tests.support.leaving import leaving
from tests.support.tiny import save_tiny

MIB = 1 << 20
TOTAL = 64 * MIB
PROMPT = tuple(range(5, 29))
NOTHING = {"engine.weights": 0, "engine.kv_cache": 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    # The first model that transformers loads in a process must not meet the stand-in: its buffers would stay empty.
    load_causal_lm(str(save_tiny(tmp_path_factory.mktemp("first"))), "float32", torch.device("cpu"))


@pytest.fixture
def device(loaded: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensors]:
    # VLLMEngine sets what vLLM reads.
    monkeypatch.setattr(os, "environ", os.environ | {})
    with gpu(TOTAL, unit=16) as device, installed():
        yield device


def config_of(**rollout) -> Config:
    data = {"max_prompt_tokens": 32, "max_response_tokens": 32}
    # Blocks that the prompt fills.
    own = {"gpu_memory_utilization": 0.25, "block_size": 8, **rollout}
    return Config.model_validate({"data": data, "rollout": own})


class Made:
    def __init__(self, folder: Path, kind: str = "llama", *, tied: bool = True, there=None, **rollout) -> None:
        path = str(save_tiny(folder, kind, tied=tied))
        self.model = load_causal_lm(path, "float32", torch.device("cuda"))
        where = there(self.model) if there else nullcontext
        self.engine = make_engine(config_of(**rollout), path, self.model, TEMPLATE, where)

    def draw(self, temperature: float = 0.8, seed: int = 0, samples: int = 1) -> list[Response]:
        request = SampleRequest(PROMPT, samples, seed)
        return self.engine.generate([request], temperature=temperature, max_tokens=8)[0]

    def change(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device))

    def difference(self, response: Response) -> float:
        """How far a response's log-probs are from the trainer's at most."""
        ids = torch.tensor([[*PROMPT, *response.token_ids]], device="cuda")
        with torch.no_grad():
            logits = self.model(ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1] / 0.8
        found = logits.log_softmax(-1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
        return (found.cpu() - torch.tensor(response.logprobs)).abs().max().item()


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_it_samples_what_the_trainer_has_over_sleeps_and_updates(tmp_path, device, kind: str, tied: bool) -> None:
    made = Made(tmp_path, kind, tied=tied)
    assert made.engine.held() == NOTHING and not made.engine.shared
    drawn = []
    for _ in range(3):
        with pytest.raises(RuntimeError, match="has slept"):
            made.draw()
        wake_with(made.engine, made.model)
        samples = made.draw(samples=2)
        assert max(made.difference(sample) for sample in samples) < 1e-4
        assert len({sample.token_ids for sample in samples}) > 1
        drawn.append([sample.token_ids for sample in samples])
        held = made.engine.held()
        assert held["engine.weights"] == sum(p.nbytes for p in made.model.parameters())
        # What is left of the share of the device.
        assert TOTAL / 5 < sum(held.values()) < TOTAL / 4
        before = torch.cuda.mem_get_info()[0]
        made.engine.sleep()
        assert torch.cuda.mem_get_info()[0] - before > 0.95 * sum(held.values())
        assert made.engine.held() == NOTHING
        made.change()
    assert drawn[0] != drawn[1] != drawn[2]


def test_without_an_update_it_would_sample_from_nothing(tmp_path, device, monkeypatch) -> None:
    made = Made(tmp_path)
    monkeypatch.setattr("gadcore.rollout.vllm_weights.cast_copy", lambda pairs: None)
    made.engine.wake("weights")
    with pytest.raises(RuntimeError, match="differ from the trainer's after an update"):
        made.engine.update_weights(PlainWeights(made.model))
    assert all(w.isnan().all() for w in made.engine.weights().values())


def test_keys_and_values_of_old_weights_are_not_used(tmp_path, device, monkeypatch) -> None:
    made = Made(tmp_path)
    wake_with(made.engine, made.model)
    made.draw()
    made.change()
    made.engine.update_weights(PlainWeights(made.model))
    assert made.difference(made.draw()[0]) < 1e-4
    # The rule that it obeys: vLLM itself does not know that its weights are others.
    made.change()
    monkeypatch.setattr(made.engine.llm, "reset_prefix_cache", lambda: True)
    made.engine.update_weights(PlainWeights(made.model))
    assert made.difference(made.draw()[0]) > 1e-3


def test_an_engine_in_bfloat16_has_its_logits_in_float32(tmp_path, device) -> None:
    made = Made(tmp_path, dtype="bfloat16")
    assert made.engine.llm._model.head_dtype == torch.float32
    wake_with(made.engine, made.model)
    assert all(torch.equal(made.engine.weights()[n], p.bfloat16()) for n, p in made.model.named_parameters())
    made.engine.close()
    del made
    made = Made(tmp_path, dtype="bfloat16", head_dtype="bfloat16")
    assert made.engine.llm._model.head_dtype == torch.bfloat16


def test_what_the_device_decides_is_said(tmp_path, device) -> None:
    made = Made(tmp_path)
    assert made.engine.notes == ["vLLM samples up to 256 sequences at a time, with CUDA graphs"]
    made.engine.close()
    del made
    made = Made(tmp_path, max_num_seqs=3, enforce_eager=True)
    assert made.engine.notes == ["vLLM samples up to 3 sequences at a time, without CUDA graphs"]


def test_a_share_that_is_not_free_is_refused_by_its_name(tmp_path, device) -> None:
    with pytest.raises(UserError, match=r"gpu_memory_utilization = 0.99 asks for .* lower it"):
        Made(tmp_path, gpu_memory_utilization=0.99)


def test_the_trainers_weights_come_when_vllm_has_made_room(tmp_path, device) -> None:
    visits, away = leaving()
    made = Made(tmp_path, gpu_memory_utilization=0.7, there=away)
    assert visits == [None]
    assert made.engine.held() == NOTHING


def test_a_closed_engine_leaves_room_for_another(tmp_path, device) -> None:
    made = Made(tmp_path / "a")
    with pytest.raises(UserError, match="one instance per process"):
        Made(tmp_path / "b")
    made.engine.close()
    made = Made(tmp_path / "c", "qwen2")
    wake_with(made.engine, made.model)
    made.engine.close()
    made.engine = VLLMEngine(config_of(), str(tmp_path / "c"), made.model, TEMPLATE)
    # vLLM cannot free what sleeps, and there is no room to wake it: the end of the process does that.
    full = torch.empty(torch.cuda.mem_get_info()[0] - MIB, dtype=torch.uint8, device="cuda")
    made.engine.close()
    del full
    made.engine.close()


def test_it_says_that_a_process_has_room_for_one() -> None:
    assert [VLLMEngine.one_a_process(device) for device in ("cpu", "cuda")] == [False, True]


def test_batch_invariance_is_for_gpus_whose_trainer_keeps_its_gradients(tmp_path, device, monkeypatch) -> None:
    Made(tmp_path / "a")
    assert os.environ["VLLM_BATCH_INVARIANT"] == "0"
    made = Made(tmp_path / "b", batch_invariant=True)
    assert os.environ["VLLM_BATCH_INVARIANT"] == "1"
    del made
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(UserError, match="batch_invariant = true needs a GPU of compute capability 9.0"):
        Made(tmp_path / "c", batch_invariant=True)


def test_a_product_that_vllm_replaces_has_no_gradient() -> None:
    """Why: aten::linear of a device, given from outside, as vLLM does it below compute capability 9.0."""
    library = torch.library.Library("aten", "IMPL")
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (x[:, None] * weight).sum(-1)

    library.impl("aten::linear", linear, "CPU")
    try:
        with pytest.raises(NotImplementedError, match="linear_backward"):
            torch.nn.functional.linear(x, weight).sum().backward()
    finally:
        library._destroy()


# --- the stand-in's own rules


def test_memory_that_sleeps_cannot_be_used(tmp_path, device) -> None:
    made = Made(tmp_path)
    llm: LLM = made.engine.llm
    weight = made.engine.engine_model.model.norm.weight
    assert math.isnan(weight.sum())
    with pytest.raises(RuntimeError, match="single memory location"):
        weight.copy_(torch.ones(64, device="cuda"))
    with pytest.raises(RuntimeError, match="would wait for ever"):
        llm.generate([{"prompt_token_ids": [1]}], [None], use_tqdm=False)
    with pytest.raises(RuntimeError, match="invalid argument"):
        llm.llm_engine.engine_core.shutdown()
    llm.wake_up(["weights"])
    assert not made.engine.engine_model.cos_sin_cache.isnan().any(), "buffers come back"
    with pytest.raises(RuntimeError, match="does not sleep"):
        llm.wake_up(["weights"])
    llm.wake_up()


def test_graphs_compute_from_where_weights_lay(tmp_path, device) -> None:
    made = Made(tmp_path)
    wake_with(made.engine, made.model)
    norm = made.engine.engine_model.model.norm.weight
    norm.data = norm.detach().clone()
    with pytest.raises(RuntimeError, match="CUDA graphs would read"):
        made.draw()
