"""The stand-in for vLLM on CUDA computes what vLLM does, and decides as it does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from bench.offline.cuda_standin import gpu
from bench.offline.vllm_standin_model import Cache, Model
from gadcore.config.rollout import VLLMRollout
from gadcore.models.loading import load_causal_lm
from gadcore.rollout.engine import SampleRequest, make_engine
from tests.engine.test_engines import make_config
from tests.support.builders import TEMPLATE, groups
from tests.support.engines import wake_with
from tests.support.tiny import save_tiny

GIB = 2**30


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama with bias", False), ("qwen2", True)])
def test_log_probs_are_vllms(tmp_path: Path, kind: str, tied: bool) -> None:
    pytest.importorskip("vllm")
    path = save_tiny(tmp_path, kind, tied=tied)
    model = load_causal_lm(str(path), "float32", torch.device("cpu"))
    engine = make_engine(make_config("vllm"), str(path), model, TEMPLATE)
    wake_with(engine, model)
    requests = [SampleRequest(g.prompt.token_ids, 1, i) for i, g in enumerate(groups(3))]
    drawn = engine.generate(requests, temperature=0.8, max_tokens=12)
    config, names = copy.deepcopy(model.config), set(dict(engine.engine_model.named_parameters()))
    engine.close()
    with gpu(GIB):
        standin = Model(config, torch.float32, 96)
        assert set(dict(standin.named_parameters())) == names
        standin.load(path)
        cache = Cache(standin, 8, 16, enabled=True)
        for request, samples in zip(requests, drawn, strict=True):
            for sample in samples:
                torch.testing.assert_close(
                    _logprobs(standin, cache, request.prompt_ids, sample.token_ids, 0.8),
                    torch.tensor(sample.logprobs),
                    rtol=0,
                    atol=1e-4,
                )


def _logprobs(model: Model, cache: Cache, prompt: tuple[int, ...], response: tuple[int, ...], t: float) -> torch.Tensor:
    found = []
    tokens = list(prompt)
    with torch.no_grad(), cache.sequence(tokens) as text:
        for token in response:
            found.append((model(tokens, text) / t).log_softmax(-1)[token].item())
            tokens.append(token)
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("memory", "name"),
    [(24 * GIB, "NVIDIA L4"), (80 * GIB, "NVIDIA H100"), (80 * GIB, "NVIDIA A100"), (190 * GIB, "NVIDIA B200")],
)
def test_the_limit_of_sequences_is_vllms_own(memory: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs, current_platform
    from vllm.usage.usage_lib import UsageContext

    for question, answer in (("get_device_total_memory", memory), ("get_device_name", name), ("is_cpu", False)):
        monkeypatch.setattr(current_platform, question, lambda *_, answer=answer: answer)
    _, sequences = EngineArgs.get_batch_defaults(1)
    assert sequences[UsageContext.LLM_CLASS] == VLLMRollout().sequences_at_once("cuda", memory, name)


def test_logits_in_float32_bring_an_engine_in_bfloat16_nearer_to_the_trainer(tmp_path: Path) -> None:
    """The head's rows have much in common, as those of trained models do: logits are large, differences small."""
    pytest.importorskip("vllm")
    made = load_causal_lm(str(save_tiny(tmp_path, tied=False)), "float32", torch.device("cpu"))
    with torch.no_grad():
        made.lm_head.weight.add_(4 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
        for p in made.parameters():
            p.copy_(p.bfloat16())
    path = str(tmp_path)
    made.save_pretrained(path)
    found = {}
    for head in ("float32", "bfloat16"):
        config = make_config("vllm", dtype="bfloat16")
        rollout = config.vllm.model_copy(update={"head_dtype": head})
        model = load_causal_lm(path, "float32", torch.device("cpu"))
        engine = make_engine(config.model_copy(update={"rollout": rollout}), path, model, TEMPLATE)
        wake_with(engine, model)
        differences = []
        for request in [SampleRequest(g.prompt.token_ids, 4, i) for i, g in enumerate(groups(5))]:
            for sample in engine.generate([request], temperature=0.8, max_tokens=16)[0]:
                ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]])
                with torch.no_grad():
                    logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / 0.8
                logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
                differences.append((logprobs - torch.tensor(sample.logprobs)).abs())
        engine.close()
        found[head] = torch.cat(differences).mean().item()
    assert found["float32"] < found["bfloat16"] / 2, found
