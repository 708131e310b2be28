"""The Hugging Face engine samples from softmax(logits / T), whatever the model's own settings of generation say."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from gadcore.config.settings import Config
from gadcore.rollout.engine import SampleRequest
from gadcore.rollout.hf import HFEngine
from tests.support.builders import TEMPLATE, groups
from tests.support.naive import token_logprobs
from tests.support.tiny import tiny_model

OWN = {
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(200, 320)),
    "forced_eos_token_id": 2,
    "bad_words_ids": [[i] for i in range(3, 100)],
    "sequence_bias": {(7,): 50.0},
    "typical_p": 0.1,
    "epsilon_cutoff": 0.01,
    "top_h": 0.1,
    "guidance_scale": 3.0,
    "stop_strings": ["a", "e"],
    "num_beams": 2,
    "max_time": 1e-9,
    "encoder_repetition_penalty": 5.0,
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize("name", OWN)
def test_no_setting_of_the_models_own_changes_a_sample(name: str) -> None:
    model, requests = tiny_model(), [SampleRequest(g.prompt.token_ids, 3, i) for i, g in enumerate(groups(2))]
    engine = HFEngine(Config(), "", model, TEMPLATE)
    plain = engine.generate(requests, temperature=0.8, max_tokens=8)
    model.generation_config = own = GenerationConfig(**{name: OWN[name]})
    assert engine.generate(requests, temperature=0.8, max_tokens=8) == plain
    assert model.generation_config is own
    for request, samples in zip(requests, plain, strict=True):
        for sample in samples:
            with torch.no_grad():
                expected = token_logprobs(model, request.prompt_ids, sample.token_ids, 0.8)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=1e-4, atol=1e-4)
