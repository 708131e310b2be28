"""Every family that the documentation names samples with vLLM what the trainer computes, before and after an update.

Some have a model of vLLM's own, others run transformers' inside vLLM, in the trainer's own classes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.errors import UserError
from gadcore.models.loading import load_causal_lm
from gadcore.models.student import Student
from gadcore.rollout.engine import SampleRequest, make_engine
from gadcore.rollout.weights import PlainWeights
from tests.engine.test_engines import make_config
from tests.support.builders import TEMPLATE, groups
from tests.support.engines import wake_with
from tests.support.tiny import save_tiny

# Llama and Qwen2 are in test_engines.
FAMILIES = ["smollm3", "qwen3", "mistral", "gemma3", "olmo2", "gpt_neox"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_with_vllm(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("vllm")
    config, path = make_config("vllm"), str(save_tiny(tmp_path, kind))
    model = load_causal_lm(path, "float32", torch.device("cpu"))
    engine = make_engine(config, path, model, TEMPLATE)
    try:
        wake_with(engine, model)
        student = Student(model, config.student, config.algorithm, temperature=0.8, micro_batch_tokens=4096)
        # A copy has the trainer's classes, and must be as usable as the model: the reference policy is one.
        reference = copy.deepcopy(model)
        requests = [SampleRequest(g.prompt.token_ids, 4, i) for i, g in enumerate(groups(5))]
        drawn = []
        for _ in range(2):
            samples = engine.generate(requests, temperature=0.8, max_tokens=24)
            drawn.append([[s.token_ids for s in group] for group in samples])
            for request, group in zip(requests, samples, strict=True):
                batch = GroupedBatch.of(
                    [GroupTokens(request.prompt_ids, tuple(s.token_ids for s in group))], last_tokens=False
                )
                with torch.no_grad():
                    logprob = student.logprobs(model, batch, 0.8)
                sampled = torch.tensor([lp for s in group for lp in s.logprobs])
                torch.testing.assert_close(sampled, logprob, rtol=0, atol=1e-3)
            student.seqkd_backward(groups(3))
            student.step(lr=3e-3)
            engine.update_weights(PlainWeights(model))
        assert drawn[0] != drawn[1], "the step was too small to be seen"
        assert torch.isfinite(reference(torch.arange(6)[None]).logits).all()
    finally:
        engine.close()


def test_a_model_that_vllm_computes_otherwise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    path = str(save_tiny(tmp_path))
    model = load_causal_lm(path, "float32", torch.device("cpu"))
    # Equal weights, used in another way.
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    with pytest.raises(UserError, match=r'vLLM does not compute what .* \(llama\): .* set rollout.engine = "hf"'):
        make_engine(make_config("vllm"), path, model, TEMPLATE)


def test_a_setting_that_only_vllm_obeys_is_named(tmp_path: Path) -> None:
    """GPT-NeoX has a key for each of its heads; transformers does not look for another number, vLLM does."""
    pytest.importorskip("vllm")
    path = save_tiny(tmp_path, "gpt_neox")
    config = json.loads((path / "config.json").read_text()) | {"num_key_value_heads": 1}
    (path / "config.json").write_text(json.dumps(config))
    model = load_causal_lm(str(path), "float32", torch.device("cpu"))
    with pytest.raises(UserError, match="take num_key_value_heads out of its config.json, which only vLLM obeys, or "):
        make_engine(make_config("vllm"), str(path), model, TEMPLATE)


def test_a_shape_that_vllm_has_no_kernel_for_is_told(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    path = str(save_tiny(tmp_path, head_dim=16))
    model = load_causal_lm(path, "float32", torch.device("cpu"))
    with pytest.raises(UserError, match=r'vLLM cannot run the model .*head_dim=16.*: rollout.engine = "hf" may$'):
        make_engine(make_config("vllm"), path, model, TEMPLATE)
