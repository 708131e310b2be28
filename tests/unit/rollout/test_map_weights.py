"""Where the trainer's parameters lie in vLLM's: under its names, and none of vLLM's without one."""

from __future__ import annotations

import pytest
from torch import nn

from gadcore.kernels.bits import row_sums
from gadcore.rollout.vllm_weights import Slice, map_weights
from tests.support.tiny import tiny_model


def engine_of(its: nn.Module, **names: str) -> nn.Module:
    """vLLM's model with equal weights; names: what its outer modules are called."""
    engine = nn.Module()
    for name, module in its.named_children():
        engine.add_module(names.get(name, name), module)
    return engine


def mapped(model: nn.Module, engine: nn.Module) -> list[Slice]:
    return map_weights(model, engine, {name: row_sums(p) for name, p in engine.named_parameters()})


def test_a_backbone_and_a_head_of_other_names() -> None:
    model = tiny_model(tied=False)
    engine = engine_of(model)
    # As GPT-NeoX calls them.
    model.gpt, model.embed_out = model.model, model.lm_head
    del model.model, model.lm_head
    model.base_model_prefix = "gpt"
    model.get_output_embeddings = lambda: model.embed_out
    slices = {s.name: s.vllm_name for s in mapped(model, engine)}
    assert slices["gpt.norm.weight"] == "model.norm.weight" and slices["embed_out.weight"] == "lm_head.weight"
    assert set(slices.values()) == {name for name, _ in engine.named_parameters()}


def test_a_weight_of_vllms_that_no_update_would_reach() -> None:
    model = tiny_model(tied=True)
    engine = engine_of(model)
    assert mapped(model, engine)
    engine.lm_head = nn.Linear(64, 320, bias=False)
    with pytest.raises(RuntimeError, match="vLLM's lm_head.weight is no parameter of the trainer's"):
        mapped(model, engine)


def test_a_weight_that_is_elsewhere() -> None:
    model = tiny_model(tied=False)
    engine = engine_of(tiny_model(tied=False, seed=1))
    with pytest.raises(RuntimeError, match="is not where it was looked for"):
        mapped(model, engine)
    with pytest.raises(RuntimeError, match="has no parameter for the trainer's model"):
        mapped(model, engine_of(model, model="other"))
