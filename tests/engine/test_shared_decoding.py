"""vLLM with cpu_decode_attention and shorter layers: its own text, where both compute the same."""

from __future__ import annotations

import pytest
import torch

from gadcore.config.settings import Config
from gadcore.cpu.decode_attention import share_prompts_in_decoding
from gadcore.cpu.decoder_layers import shorten_layers
from gadcore.models.loading import load_causal_lm
from gadcore.rollout.engine import SampleRequest, make_engine
from tests.support.builders import TEMPLATE, groups
from tests.support.engines import wake_with
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.native
LIMIT = 24


class Engine:
    def __init__(self, directory, kind: str) -> None:
        pytest.importorskip("vllm")
        config = Config.model_validate(
            {
                "data": {"max_prompt_tokens": 96, "max_response_tokens": LIMIT},
                "rollout": {"engine": "vllm", "dtype": "float32", "group_size": 4, "max_num_seqs": 128},
                "algorithm": {"kl_coef": 0.0},
            }
        )
        path = str(save_tiny(directory, kind))
        self.model = load_causal_lm(path, "float32", torch.device("cpu"))
        self.engine = make_engine(config, path, self.model, TEMPLATE)
        (self.runner,) = self.engine.llm.collective_rpc(lambda worker: worker.model_runner)

    def impls(self) -> list:
        layers = self.runner.vllm_config.compilation_config.static_forward_context.values()
        return [layer.impl for layer in layers]

    def installed(self) -> int:
        return sum("forward" in vars(impl) for impl in self.impls())

    def remove(self) -> None:
        for impl in self.impls():
            vars(impl).pop("forward", None)

    def decode(self) -> tuple[list[tuple[int, ...]], torch.Tensor, dict[str, int]]:
        """Tokens and log-probs of greedy samples, four of each prompt, and how often layers and attention were called.

        Attention that is a part of cpu_decode_layer does not count.
        """
        # Prompts of two whole blocks and more, so that there are blocks to share.
        requests = [
            SampleRequest((g.prompt.token_ids * 96)[: 70 + 5 * i], 1, i)
            for i, g in enumerate(groups(3))
            for _ in range(4)
        ]
        wake_with(self.engine, self.model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            drawn = self.engine.generate(requests, temperature=0.0, max_tokens=LIMIT)
        self.engine.sleep()
        calls = {e.key: e.count for e in profile.key_averages()}
        names = {
            "layers": "gadcore::cpu_decode_layer",
            "ours": "gadcore::cpu_decode_attention",
            "theirs": "_C::cpu_attention_with_kv_cache",
        }
        samples = [sample for (sample,) in drawn]
        return (
            [s.token_ids for s in samples],
            torch.tensor([p for s in samples for p in s.logprobs]),
            {name: calls.get(op, 0) for name, op in names.items()},
        )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    made = Engine(tmp_path_factory.mktemp("model"), "llama")
    yield made
    made.engine.close()


def test_greedy_text_is_that_of_vllms_own_attention(llama) -> None:
    assert llama.installed() == 2
    lengthen(llama)
    tokens, logprobs, calls = llama.decode()
    longest = max(map(len, tokens))
    assert longest > 4
    # The first token comes from the prompt's step, which stays vLLM's.
    assert calls["ours"] == 2 * (longest - 1) and calls["theirs"] == 2
    llama.remove()
    expected, expected_logprobs, calls = llama.decode()
    assert calls["ours"] == 0 and calls["theirs"] == 2 * longest
    assert share_prompts_in_decoding(llama.runner) == 2
    assert shorten_layers(llama.engine.engine_model) == 2
    assert tokens == expected
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-5)


def test_where_the_kernels_disagree_vllms_stays(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops as ops

    llama.remove()
    with monkeypatch.context() as patched:
        patched.setattr(ops, "cpu_attention_with_kv_cache", lambda output, **_: output.zero_())
        assert share_prompts_in_decoding(llama.runner) == 0
    assert llama.installed() == 0
    assert share_prompts_in_decoding(llama.runner) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 9},
        {"logits_soft_cap": 30.0},
        {"alibi_slopes": torch.ones(2)},
        {"sinks": torch.zeros(2)},
        {"kv_cache_dtype": "fp8"},
        {"kv_sharing_target_layer_name": "another"},
        {"attn_type": "encoder_only"},
        {"head_size": 48},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_attention_is_left_to_vllm(llama, change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.remove()
    with monkeypatch.context() as patched:
        for name, value in change.items():
            patched.setattr(llama.impls()[0], name, value)
        assert share_prompts_in_decoding(llama.runner) == 1
    assert "forward" not in vars(llama.impls()[0])
    llama.remove()
    assert share_prompts_in_decoding(llama.runner) == 2


def layers(engine: Engine) -> list:
    return list(engine.engine.engine_model.model.layers)


def lengthen(engine: Engine) -> None:
    for layer in layers(engine):
        vars(layer).pop("forward", None)
        layer.self_attn.attn.use_direct_call = False


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    made = Engine(tmp_path_factory.mktemp("model"), "qwen2")
    yield made
    made.engine.close()


# Qwen2's products of queries, keys and values have biases.
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_text_is_that_of_vllms_own_layers(family: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(family)
    assert all("forward" in vars(layer) for layer in layers(engine))
    tokens, logprobs, calls = engine.decode()
    # The first token comes from the prompt's step.
    assert calls["layers"] == 2 * (max(map(len, tokens)) - 1) > 0 and calls["ours"] == 0
    lengthen(engine)
    expected, expected_logprobs, calls = engine.decode()
    assert calls["layers"] == 0
    assert shorten_layers(engine.engine.engine_model) == 2
    assert tokens == expected
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-5)


def test_without_shared_prompts_a_layer_is_not_one_call(llama) -> None:
    llama.remove()
    assert llama.decode()[2]["layers"] == 0
    assert share_prompts_in_decoding(llama.runner) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("is_neox_style", False), ("rotary_dim", 8), ("__class__", type("Other", (torch.nn.Module,), {}))],
)
def test_other_rotations_are_left_to_vllm(llama, name: str, value, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = layers(llama)[0].self_attn.rotary_emb
    lengthen(llama)
    with monkeypatch.context() as patched:
        patched.setattr(rotary, name, value)
        assert shorten_layers(llama.engine.engine_model) == 2
    # Both layers have the same rotation.
    assert llama.decode()[2]["layers"] == 0
    lengthen(llama)
    assert shorten_layers(llama.engine.engine_model) == 2


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("self_attn", "qk_norm", True),
        ("self_attn.o_proj", "skip_bias_add", True),
        ("self_attn.qkv_proj", "tp_size", 2),
        ("mlp.gate_up_proj", "quant_method", object()),
        ("input_layernorm", "has_weight", False),
        ("post_attention_layernorm", "variance_size_override", 8),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_layers_are_left_to_vllm(llama, part: str, name: str, value, monkeypatch: pytest.MonkeyPatch) -> None:
    lengthen(llama)
    with monkeypatch.context() as patched:
        patched.setattr(layers(llama)[0].get_submodule(part), name, value, raising=False)
        assert shorten_layers(llama.engine.engine_model) == 1
    assert "forward" not in vars(layers(llama)[0])
    lengthen(llama)
    assert shorten_layers(llama.engine.engine_model) == 2
