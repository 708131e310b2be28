"""The student's adapter in vLLM's slot on CUDA, with stand-ins for vLLM and the GPU: from load to sync, over sleeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench.offline.cuda_standin import gpu
from bench.offline.cuda_standin.tensors import Tensors
from bench.offline.vllm_standin import installed
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.errors import UserError
from gadcore.models.adapter import quantise_base
from gadcore.models.loading import load_causal_lm
from gadcore.models.shared_base import SharedBase
from gadcore.rollout.engine import SampleRequest, make_engine
from gadcore.rollout.vllm import VLLMEngine
from gadcore.rollout.weights import PlainWeights
from tests.support.adapters import trained
from tests.support.builders import TEMPLATE
from tests.support.engines import wake_with
from tests.support.leaving import leaving
from tests.support.tiny import save_tiny

MIB = 1 << 20
TOTAL = 64 * MIB
PROMPT = tuple(range(5, 29))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    # The first model that transformers loads in a process must not meet the stand-in: its buffers would stay empty.
    load_causal_lm(str(save_tiny(tmp_path_factory.mktemp("first"))), "float32", torch.device("cpu"))


@pytest.fixture
def device(loaded: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensors]:
    monkeypatch.setattr(os, "environ", os.environ | {})
    with gpu(TOTAL, unit=16) as device, installed():
        yield device


class Made:
    def __init__(self, folder: Path, kind: str = "llama", *, there=None, share: float = 0.25, **adapter) -> None:
        path = str(save_tiny(folder, kind))
        self.config = Config.model_validate(
            {
                "data": {"max_prompt_tokens": 32, "max_response_tokens": 32},
                "rollout": {"gpu_memory_utilization": share, "block_size": 8},
                "student": {"adapter": "lora", **adapter},
            }
        )
        base = load_causal_lm(path, "float32", torch.device("cuda"))
        quantise_base(base, self.config.student, torch.device("cuda"), "student")
        self.model = SharedBase(base, path).policy(self.config.student)
        with torch.device("cpu"):
            trained(self.model, 3)
        where = there(self.model) if there else nullcontext
        self.engine = make_engine(self.config, path, self.model, TEMPLATE, where)
        assert isinstance(self.engine, VLLMEngine)

    def draw(self, samples: int = 1) -> list[Response]:
        request = SampleRequest(PROMPT, samples, 0)
        return self.engine.generate([request], temperature=0.8, max_tokens=8)[0]

    def difference(self, response: Response) -> float:
        """How far a response's log-probs are from the trainer's at most."""
        ids = torch.tensor([[*PROMPT, *response.token_ids]], device="cuda")
        with torch.no_grad():
            logits = self.model(ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1] / 0.8
        found = logits.log_softmax(-1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
        return (found.cpu() - torch.tensor(response.logprobs)).abs().max().item()


CASES = {
    # The slot is of rank 8: what of it is nobody's must not be what sleep has left there.
    "a rank that vLLM has not": ("llama", {"adapter_rank": 4}),
    "a rank that vLLM has": ("qwen2", {"adapter_rank": 8}),
    # Of a fused layer's members two have no adapter.
    "some members": ("qwen2", {"adapter_rank": 8, "adapter_targets": "q_proj,down_proj"}),
    "eight bits": ("llama", {"adapter_rank": 8, "adapter_base": "int8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_samples_what_the_trainer_has_over_sleeps_and_updates(tmp_path, device, case) -> None:
    kind, adapter = CASES[case]
    made = Made(tmp_path, kind, **adapter)
    assert not made.engine.shared
    drawn = []
    for seed in range(3):
        wake_with(made.engine, made.model)
        samples = made.draw(samples=2)
        assert max(made.difference(sample) for sample in samples) < 1e-4
        drawn.append([sample.token_ids for sample in samples])
        made.engine.sleep()
        with torch.device("cpu"):
            trained(made.model, 10 + seed)
    assert drawn[0] != drawn[1] != drawn[2]


def test_an_update_without_its_adapter_is_told(tmp_path, device) -> None:
    class Without(PlainWeights):
        def __iter__(self):
            return ((name, tensor) for name, tensor in super().__iter__() if not name.endswith("lora_B"))

    made = Made(tmp_path, adapter_rank=4)
    made.engine.wake("weights")
    with pytest.raises(RuntimeError, match="has not the adapters that vLLM computes with: .*lora_B"):
        made.engine.update_weights(Without(made.model))


def test_which_tokens_have_the_adapter_is_written_again_after_a_sleep(tmp_path, device, monkeypatch) -> None:
    """vLLM writes it where it has changed, and does not know that it was lost."""
    made = Made(tmp_path, adapter_rank=8)
    # One token a request: every forward pass has the same table.
    request = SampleRequest(PROMPT, 1, 0)
    for _ in range(2):
        wake_with(made.engine, made.model)
        made.engine.generate([request], temperature=0.0, max_tokens=1)
        made.engine.sleep()
    renew = type(made.engine.adapter).renew

    def without(adapter) -> None:
        last = adapter._manager._last_mapping
        renew(adapter)
        adapter._manager._last_mapping = last

    monkeypatch.setattr(type(made.engine.adapter), "renew", without)
    wake_with(made.engine, made.model)
    with pytest.raises(RuntimeError, match="memory that has slept which tokens have an adapter"):
        made.engine.generate([request], temperature=0.0, max_tokens=1)


def test_the_base_comes_when_vllm_has_made_room(tmp_path, device) -> None:
    """What a card of 24 GB has room for: vLLM's weights and cache, or its weights and the trainer's."""
    visits, away = leaving()
    made = Made(tmp_path, share=0.7, there=away, adapter_rank=4, adapter_base="int8")
    assert visits == [None, None]
    assert made.engine.held() == {"engine.weights": 0, "engine.kv_cache": 0}


def test_a_rank_above_vllms_is_told(tmp_path, device) -> None:
    with pytest.raises(UserError, match="vLLM takes adapters of rank 512 at most: lower student.adapter_rank = 600"):
        Made(tmp_path, adapter_rank=600)
