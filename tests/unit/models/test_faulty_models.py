"""Model directories with something wrong in them: each is one sentence that names what, before anything is trained."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from gadcore.errors import UserError, cause, foreign
from gadcore.models.discriminator import Discriminator
from gadcore.models.generation import read_generation_config
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from gadcore.plan.dimensions import read_dimensions
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

Damage = Callable[[Path], Any]
UP = "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def refusal(path: Path, role: type[Student] | type[Discriminator] = Student) -> str:
    with pytest.raises(UserError) as caught:
        role.load(ModelSpec.resolve(str(path)), device="cpu")
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "quantised (gptq)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised (awq)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised (compressed-tensors)"),
        ({"quantization_config": {"quant_method": "nobody's"}}, "quantised (nobody's)"),
        ({"quantization_config": "text"}, "cannot read the model"),
        ({"rope_parameters": {"rope_type": "strange", "rope_theta": 1e4}}, "rope_parameters.rope_type = 'strange'"),
        ({"hidden_act": "strange"}, "hidden_act = 'strange'"),
        ({"hidden_act": None}, "'hidden_act' expected str"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"pad_token_id": 9999}, "Padding_idx must be within num_embeddings"),
        ({"dtype": "float7"}, "float7"),
        ({"model_type": ["llama"]}, "unhashable type"),
        ({"num_hidden_layers": 3}, "lacks the weights ['model.layers.2."),
        ({"num_hidden_layers": 1}, "has no place for ['model.layers.1."),
        ({"num_hidden_layers": 0}, "has no place for ['model.layers.0."),
        ({"vocab_size": 300}, "has a token of id 319"),
        ({"intermediate_size": 97}, "is [64, 96] and must be [64, 97] (6 such weights)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("role", [Student, Discriminator])
def test_settings_that_transformers_raises_for(model: Path, role: Any, change: dict[str, Any], words: str) -> None:
    edit(model / "config.json", **change)
    assert words in refusal(model, role)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 10**9),
        ("vocab_size", 10**12),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", 10**30),
        ("num_attention_heads", 10**9),
        ("num_key_value_heads", 10**9),
        ("head_dim", 10**9),
        ("intermediate_size", 10**9),
        # Of these vLLM makes a table of angles, and transformers a dictionary of names.
        ("max_position_embeddings", 10**9),
        ("num_labels", 10**9),
    ],
)
def test_a_size_that_no_model_has_is_told_before_anything_is_made_of_it(model: Path, name: str, value: int) -> None:
    edit(model / "config.json", **{name: value})
    said = f"{float(value) if value > 10**18 else value}"
    assert f"config.json says {name} = {said}, and no model has more than" in refusal(model)
    with pytest.raises(UserError, match=f"says {name} = "):
        read_dimensions(str(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 1 << 20},
        {"vocab_size": 1 << 24},
        {"num_hidden_layers": 900},
        {"intermediate_size": 1 << 24},
        {"num_attention_heads": 1 << 12, "hidden_size": 1 << 12},
        {"head_dim": 1 << 24},
    ],
    ids=str,
)
@pytest.mark.parametrize("role", [Student, Discriminator])
def test_a_model_far_beyond_its_weights_takes_no_memory(model: Path, role: Any, changes: dict[str, int]) -> None:
    edit(model / "config.json", **changes)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert "do not fit its config.json: that describes a model of" in refusal(model, role)
    assert time.monotonic() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(model: Path, value: float) -> None:
    edit_weights(model, lambda tensors: tensors[UP].__setitem__((3, 4), value))
    assert f"NaN or infinite values in {UP}" in refusal(model)


def test_quantised_weights_without_a_config_that_says_so(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({UP: (tensors[UP] * 10).to(torch.int8)}))
    assert f"holds {UP} as I8" in refusal(model)


def test_a_weight_that_the_model_has_no_place_for(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({"model.layers.1.strange": torch.ones(2)}))
    assert "has no place for ['model.layers.1.strange']" in refusal(model)


@pytest.mark.parametrize("name", ["lm_head.weight", "score.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_weights_beside_the_model_are_no_fault(tmp_path: Path, name: str) -> None:
    path = save_tiny(tmp_path / "untied", tied=False)
    edit_weights(path, lambda tensors: tensors.setdefault(name, torch.ones(1, 64)))
    spec = ModelSpec.resolve(str(path))
    Student.load(spec, device="cpu")
    Discriminator.load(spec, device="cpu")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_git_lfs_pointer(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    assert f"{model / name} is a git-lfs pointer" in refusal(model)


def test_a_damaged_shard_is_named(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 40)
    assert f"{model / 'model.safetensors'} is damaged" in refusal(model)


def without(key: str, **changes: Any) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / "tokenizer.json").read_text())
        content[key] = changes
        (path / "tokenizer.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("model", type="Strange"), "did not match any variant"),
        (without("pre_tokenizer", type="Strange"), "did not match any variant"),
        (lambda path: (path / "tokenizer.json").write_text("[]"), "cannot load a tokenizer"),
        (lambda path: (path / "tokenizer.json").unlink(), "which has no tokenizer.json"),
        (lambda path: (path / "tokenizer_config.json").write_text("[]"), "cannot load a tokenizer"),
        (lambda path: edit(path / "tokenizer_config.json", eos_token=5), "eos_token has to be"),
        (lambda path: edit(path / "tokenizer_config.json", model_max_length="long"), "'long'"),
        (lambda path: edit(path / "tokenizer_config.json", unk_token=""), "unk_token = '' is no token"),
        (lambda path: edit(path / "tokenizer_config.json", model_max_length="3"), "model_max_length = '3'"),
        (lambda path: edit(path / "tokenizer_config.json", model_max_length=float("nan")), "NaN"),
    ],
)
def test_tokenizers_that_cannot_be_read(model: Path, damage: Damage, words: str) -> None:
    damage(model)
    assert words in refusal(model)


def test_a_classifier_with_two_labels_is_no_discriminator(model: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).save_pretrained(model)
    assert "has a head of 2 labels (score.weight)" in refusal(model, Discriminator)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=1)), "(gpt2)"),
        (
            lambda: FalconForCausalLM(
                FalconConfig(vocab_size=320, hidden_size=32, num_attention_heads=1, num_hidden_layers=1)
            ),
            "cannot load",
        ),
    ],
    ids=["gpt2", "falcon"],
)
def test_architectures_of_another_build(model: Path, make: Callable[[], PreTrainedModel], words: str) -> None:
    make().save_pretrained(model)
    assert words in refusal(model)


# One special token for everything


def test_a_tokenizer_whose_only_special_token_is_its_end_marker(model: Path) -> None:
    words = tiny_tokenizer()
    content = json.loads(words.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<|im_end|>"]
    (model / "tokenizer.json").write_text(json.dumps(content))
    edit(model / "tokenizer_config.json", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|im_end|>"))
    assert set(ModelSpec.resolve(str(model)).tokenizer.all_special_ids) == {2}
    loaded = Discriminator.load(str(model), device="cpu")
    loaded.save(model.parent / "saved")
    # Hugging Face scores texts one by one then, at their last token.
    again = AutoModelForSequenceClassification.from_pretrained(model.parent / "saved")
    assert again.config.pad_token_id is None
    ids = torch.tensor([[5, 9, 2]])
    hidden = again.base_model(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(again(ids).logits[0], again.score(hidden))


# What a model says of generation


@pytest.mark.parametrize(
    ("content", "saved", "told"),
    [
        ({"eos_token_id": 2, "do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}, None),
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9}, "do_sample = true"),
        ({"eos_token_id": [2, 1], "do_sample": False, "top_p": 0.6}, {"eos_token_id": [2, 1], "top_p": None}, "top_p"),
        ({"temperature": 0.0}, {"temperature": None}, "temperature"),
        ({"eos_token_id": 2, "max_new_tokens": "many"}, {"eos_token_id": 2, "max_new_tokens": None}, "ids alone"),
        ({"eos_token_id": "x", "num_return_sequences": 4}, {"eos_token_id": None}, "eos_token_id = 'x'"),
        ({"eos_token_id": 2, "pad_token_id": []}, {"eos_token_id": 2, "pad_token_id": None}, "pad_token_id"),
        ({"eos_token_id": [], "bos_token_id": [1]}, {"eos_token_id": None, "bos_token_id": None}, "ids alone"),
        ({"watermarking_config": {"strange": 1}}, {"watermarking_config": None}, "strange"),
    ],
    ids=str,
)
def test_any_generation_config_is_saved_as_a_valid_one(
    model: Path, content: dict[str, Any], saved: dict[str, Any], told: str | None
) -> None:
    (model / "generation_config.json").write_text(json.dumps(content))
    spec = ModelSpec.resolve(str(model))
    assert [told in note for note in spec.notes()] == ([] if told is None else [True])
    Student.load(spec, device="cpu").save(model.parent / "saved")
    again = GenerationConfig.from_pretrained(model.parent / "saved")
    again.validate(strict=True)
    assert {name: getattr(again, name) for name in saved} == saved


def test_a_model_without_one_and_one_in_config_json(model: Path) -> None:
    (model / "generation_config.json").unlink()
    assert read_generation_config(str(model))[1] is None
    edit(model / "config.json", temperature=0.7, eos_token_id=2)
    spec = ModelSpec.resolve(str(model))
    assert "do_sample" in spec.notes()[0]
    Student.load(spec, device="cpu").save(model.parent / "saved")
    assert GenerationConfig.from_pretrained(model.parent / "saved").eos_token_id == 2


@pytest.mark.parametrize("content", ["{", "[]", "5"])
def test_a_generation_config_that_is_no_object(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    assert "generation_config.json is no JSON" in refusal(model)


def test_what_cannot_be_saved_is_told_when_it_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(self: Any, folder: str, **kwargs: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(type(tiny_model().config), "save_pretrained", raising)
    assert "could be trained but not saved: no" in refusal(model)


# The door for other people's exceptions


class PanicException(BaseException):
    """As a library in Rust raises one."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("first\n  second line"), "what: first second line: do this"),
        (KeyError("name"), "what: KeyError: 'name': do this"),
        (AssertionError(), "what: AssertionError: do this"),
        (RecursionError("too deep"), "what: too deep: do this"),
        (PanicException("poisoned"), "what: PanicException: poisoned: do this"),
    ],
)
def test_exceptions_of_others_become_a_sentence_and_stay_its_cause(error: BaseException, sentence: str) -> None:
    with pytest.raises(UserError) as caught, foreign("what", "do this"):
        raise error
    assert str(caught.value) == sentence and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(1), UserError("ours")])
def test_what_is_no_fault_of_the_input_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign("what"):
        raise error
    assert caught.value is error


def test_a_long_cause_is_cut() -> None:
    assert len(cause(ValueError("x" * 9000))) < 420
