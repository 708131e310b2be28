"""Models: names, the cache of bundled models, saving of shared storage, and what is refused at loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gadcore.errors import UserError
from gadcore.files import checksum
from gadcore.models.loading import (
    BUNDLED,
    load_causal_lm,
    load_discriminator,
    load_tokenizer,
    padding_id,
    resolve_model,
    save_model,
)
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def load(path: Path) -> PreTrainedModel:
    return load_causal_lm(str(path), "float32", CPU)


# Names


def test_a_directory_and_a_hub_id_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert resolve_model("owner/name") == "owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine") == str(tmp_path / "mine")


@pytest.mark.parametrize("name", ["smollm", "a/b/c", "/no/such", "./none", "../none", "~/none", "file.gguf"])
def test_a_name_that_is_no_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file.gguf").touch()
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value) and "smollm2-135m-instruct" in str(caught.value)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a model directory: it has no config.json"):
        resolve_model(str(tmp_path))


# The cache of bundled models


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted model "small" in a cache of its own; its package is not there to convert it again."""
    monkeypatch.setenv("GADCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BUNDLED, "small", ("no_such_package", "small.gguf"))
    directory = tmp_path / "cache/small"
    directory.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes(name.encode() * 100)
    sums = {file.name: checksum(file) for file in directory.iterdir()}
    (directory / "checksums.json").write_text(json.dumps(sums))
    return directory


def test_a_sound_cache_is_used(cached: Path) -> None:
    assert resolve_model("small") == str(cached)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_cache_is_told_with_file_and_remedy(cached: Path, damage: str) -> None:
    file = cached / "model.safetensors"
    content = file.read_bytes()
    flipped = bytes([content[0], content[1] ^ 1]) + content[2:]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(UserError) as caught:
        resolve_model("small")
    assert str(file) in str(caught.value) and f"delete {cached} and start again" in str(caught.value)


def test_a_bundled_model_whose_package_is_missing(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GADCORE_CACHE", str(cached.parent / "other"))
    with pytest.raises(UserError, match="'small' comes with the Python package no-such-package: install it"):
        resolve_model("small")
    assert not (cached.parent / "other").exists()


# Padding


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **special)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<|im_start|>", "unk_token": "<|endoftext|>"}, 1),
        ({"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, 0),
        ({"unk_token": "<|im_end|>", "bos_token": "<|im_start|>"}, 1),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, 0),
    ],
)
def test_padding_is_never_the_end_marker(special: dict[str, str], expected: int) -> None:
    assert padding_id(tokenizer(**special), end_id=2, vocabulary=320) == expected


def test_no_token_for_padding() -> None:
    assert padding_id(tokenizer(eos_token="<|im_end|>"), end_id=2, vocabulary=320) is None
    # Nor one that the model has no embedding for.
    assert padding_id(tokenizer(pad_token="<|im_start|>", eos_token="<|endoftext|>"), end_id=0, vocabulary=1) is None


# Saving


def fuse(model: PreTrainedModel) -> torch.Tensor:
    """Makes every parameter a view into one tensor, as a sampler that shares its weights does."""
    parameters = list(model.parameters())
    storage = torch.empty(sum(p.numel() for p in parameters))
    for p, view in zip(parameters, storage.split([p.numel() for p in parameters]), strict=True):
        view.copy_(p.data.flatten())
        p.data = view.view_as(p)
    # One of them with its rows apart from each other.
    weight = model.model.layers[0].mlp.down_proj.weight
    wide = torch.zeros(weight.shape[0], weight.shape[1] + 5)
    wide[:, 3:-2] = weight.data
    weight.data = wide[:, 3:-2]
    assert not weight.is_contiguous()
    return storage


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_views_into_a_larger_tensor_come_back_to_the_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    model = tiny_model(kind, tied=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    storage = fuse(model)
    save_model(model, tiny_tokenizer(), tmp_path)

    loaded = load(tmp_path)
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118
    # Each parameter once, and nothing of the tensor around it.
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < storage.nbytes + 10_000
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()
    # The model that goes on training still shares its storage.
    assert model.model.norm.weight.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()


# Loading


def gemma2(cap: float | None) -> PreTrainedModel:
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=1.0, final_logit_softcapping=cap,
        attn_logit_softcapping=None,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def cohere(scale: float) -> PreTrainedModel:
    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logit_scale=scale, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return CohereForCausalLM(config)


@pytest.mark.parametrize(("make", "value"), [(gemma2, 30.0), (cohere, 0.0625)])
def test_logits_that_are_changed_after_the_head_are_refused(
    make: Callable[[float], PreTrainedModel], value: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make(value).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} \(\w+\) changes its logits after the output head"):
        load(tmp_path)


@pytest.mark.parametrize(("make", "value"), [(gemma2, None), (cohere, 1.0)])
def test_the_same_models_with_plain_logits_are_taken(
    make: Callable[[float | None], PreTrainedModel], value: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make(value).save_pretrained(tmp_path)
    assert not load(tmp_path).training


def drop(directory: Path, *names: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    drop(tmp_path, "model.layers.1.mlp.up_proj.weight")
    message = r"lacks the weights \['model\.layers\.1\.mlp\.up_proj\.weight'\]"
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    with pytest.raises(UserError, match=message):
        discriminator(tmp_path, seed=0)


@pytest.mark.parametrize("damage", ["no weights", "no config", "bad config", "unknown type"])
def test_a_model_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    save_tiny(tmp_path)
    if damage == "no weights":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "no config":
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text("{" if damage == "bad config" else '{"model_type": "none"}')
    what = "load" if damage == "no weights" else "read"
    with pytest.raises(UserError, match=f"cannot {what} the model {tmp_path}: ") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_in_a_pickle_are_not_read(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load(tmp_path)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot load a tokenizer from {tmp_path}, which has no tokenizer.json: "):
        load_tokenizer(str(tmp_path))


def discriminator(path: Path, seed: int, words: PreTrainedTokenizerFast | None = None) -> PreTrainedModel:
    return load_discriminator(
        str(path), "float32", device=CPU, seed=seed, end_id=2, tokenizer=words or tiny_tokenizer()
    )


def test_a_stored_head_is_kept_and_padding_is_not_the_end_marker(tmp_path: Path) -> None:
    words = tiny_tokenizer()
    assert words.pad_token_id == 2
    first = discriminator(save_tiny(tmp_path / "base"), seed=1, words=words)
    assert first.config.pad_token_id == words.pad_token_id == 0
    save_model(first, words, tmp_path / "judge")
    again = discriminator(tmp_path / "judge", seed=2)
    head, stored = again.get_parameter("score.weight"), first.get_parameter("score.weight")
    assert head.shape == (1, 64) and torch.equal(head, stored)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_weights_are_a_sentence(tmp_path, content) -> None:
    path = save_tiny(tmp_path / "model")
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as caught:
        load_causal_lm(str(path), "float32", torch.device("cpu"))
    assert "\n" not in str(caught.value)
