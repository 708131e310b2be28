"""Dimensions of models from config.json alone, against real models and the totals that the papers' models have."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from gadcore.errors import UserError
from gadcore.models.activations import bytes_per_token
from gadcore.models.backbone import use_packed_attention
from gadcore.models.fused import fuse_backbone
from gadcore.plan.activations import fake_layer_bytes, kept_bytes, layer_bytes
from gadcore.plan.dimensions import find_config, read_config, read_dimensions
from tests.support.tiny import FAMILIES, tiny_model

PUBLISHED = {
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "smollm2-135m-instruct": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models_have_their_published_totals(name) -> None:
    assert read_dimensions(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_counts_are_those_of_real_models(tmp_path, kind, tied) -> None:
    model = tiny_model(kind, tied=tied)
    model.save_pretrained(tmp_path)
    d = read_dimensions(str(tmp_path))
    assert d.parameters == sum(p.numel() for p in model.parameters())
    discriminator = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert d.scalar_parameters == sum(p.numel() for p in discriminator.parameters())
    layer = model.model.layers[0]
    assert d.matrices == sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    embedding = model.get_input_embeddings().weight.numel()
    assert d.root == embedding * (1 if tied else 2) + d.hidden and d.head == embedding
    assert (d.tied, d.query, d.key) == (tied, 64, 32)


def test_a_cache_of_a_prompt_has_the_bytes_that_are_counted(tmp_path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found == 3 * read_dimensions(str(tmp_path)).kv_bytes(4)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_kept_activations_are_those_of_the_real_code(tmp_path, kind) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    d, (_, config) = read_dimensions(str(tmp_path)), read_config(str(tmp_path))
    use_packed_attention(model)
    fuse_backbone(model)
    # Counted with hooks on a real model; tensors that belong to no token are a few bytes of it.
    assert kept_bytes(d, "off", 1.0, autocast=False) == pytest.approx(bytes_per_token(model)["off"], rel=0.01)
    for mode in ("off", "selective", "full"):
        assert layer_bytes(d, mode, autocast=False) == fake_layer_bytes(config, mode)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_can_be_run_on_fake_tensors(tmp_path, kind) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    _, config = read_config(str(tmp_path))
    kept = [fake_layer_bytes(config, mode) for mode in ("off", "selective", "full")]
    # On the CPU "off" makes norms again and may keep less than "selective", which keeps the result of every product.
    assert min(kept[:2]) > kept[2] == 4 * 64


def test_a_scale_that_was_found_is_used() -> None:
    d = read_dimensions("smollm2-135m-instruct")
    doubled = replace(d, kept_scale={"off": 2.0})
    last = kept_bytes(d, "off", 10, autocast=False) - 10 * d.layers * layer_bytes(d, "off", autocast=False)
    layers = 10 * 2 * d.layers * layer_bytes(d, "off", autocast=False)
    assert kept_bytes(doubled, "off", 10, autocast=False) == layers + last


def test_a_models_own_settings_come_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GADCORE_CACHE", str(tmp_path))
    known = find_config("smollm2-135m-instruct")
    assert known.name == "smollm2-135m-instruct.json"
    (tmp_path / "smollm2-135m-instruct").mkdir()
    own = tmp_path / "smollm2-135m-instruct" / "config.json"
    own.write_text(known.read_text())
    assert find_config("smollm2-135m-instruct") == own
    assert find_config(str(own.parent)) == own


def test_a_model_that_is_not_at_hand_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match="nobody/nothing.*Qwen/Qwen2.5-14B-Instruct"):
        read_dimensions("nobody/nothing")
    with pytest.raises(UserError, match="no config.json"):
        read_dimensions(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(UserError, match="cannot read the model settings .*config.json"):
        read_dimensions(str(tmp_path))
