"""Adapters in peft's format: ours out and in again, anybody's in, and what cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.errors import UserError
from gadcore.models.adapter import adapted_layers, own_parameters
from gadcore.models.discriminator import Discriminator
from gadcore.models.peft_format import CONFIG, WEIGHTS, write_adapter
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from tests.support.adapters import trained
from tests.support.builders import groups
from tests.support.tiny import save_tiny

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def spec(module_folder) -> ModelSpec:
    return ModelSpec.resolve(str(save_tiny(module_folder / "model", "qwen2")))


@pytest.fixture(scope="module")
def roles(spec: ModelSpec) -> tuple[Student, Discriminator]:
    """With adapters as training leaves them, the student's beside some layers alone."""
    settings = StudentSettings(adapter="lora", adapter_rank=4, adapter_targets="q_proj,down_proj", adapter_rslora=True)
    student = Student.load(spec, settings, device="cpu")
    scorer = DiscriminatorSettings(adapter="lora", adapter_rank=2)
    discriminator = Discriminator.load(spec, scorer, student=spec, device="cpu", base=student.base)
    trained(student.model, 1)
    trained(discriminator.model, 2)
    return student, discriminator


@pytest.fixture(scope="module")
def folders(roles: tuple[Student, Discriminator], module_folder: Path) -> tuple[Path, Path]:
    """Both saved: plain directories with an adapter's folder in each."""
    places = module_folder / "student", module_folder / "discriminator"
    for role, place in zip(roles, places, strict=True):
        place.mkdir()
        role.save(place)
    return places


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def test_a_saved_student_is_a_plain_model(roles, folders) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(roles[0].model), rtol=1e-4, atol=1e-4)
    names = load_file(folders[0] / "model.safetensors").keys()
    assert names == {n for n, _ in plain.named_parameters()} and not [n for n in names if "lora" in n]


def test_a_saved_discriminator_is_a_classifier(roles, folders) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(folders[1], dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(roles[1].model), rtol=1e-4, atol=1e-4)


def settings_of(role, folder: Path, **others):
    kind = StudentSettings if isinstance(role, Student) else DiscriminatorSettings
    return kind(adapter="lora", adapter_from=str(folder), **others)


def test_an_adapter_goes_on_from_its_folder_to_the_bit(spec, roles, folders) -> None:
    for role, place in zip(roles, folders, strict=True):
        settings = settings_of(role, place / "adapter")
        again = type(role).load(spec, settings, device="cpu")
        theirs = own_parameters(again.model)
        assert theirs.keys() == own_parameters(role.model).keys()
        for name, p in own_parameters(role.model).items():
            assert torch.equal(p, theirs[name]), name
        assert {layer.scale for layer in adapted_layers(again.model).values()} == {
            layer.scale for layer in adapted_layers(role.model).values()
        }
        torch.testing.assert_close(logits(again.model), logits(role.model))


def of_peft(folder: Path, **changes) -> Path:
    """A folder as peft 0.21 writes one, of rank 2 on q_proj and v_proj."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for module, rows in (("q_proj", 64), ("v_proj", 32)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, 64, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    config |= {"use_rslora": False, "use_dora": False, "lora_dropout": 0.05, "rank_pattern": {}, "alpha_pattern": {}}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def test_somebodys_adapter_is_trained_on(spec, tmp_path) -> None:
    folder = of_peft(tmp_path / "theirs")
    student = Student.load(spec, StudentSettings(adapter="lora", adapter_from=str(folder), lr=1e-2), device="cpu")
    layers = adapted_layers(student.model)
    assert len(layers) == 4 and {layer.scale for layer in layers.values()} == {4.0}
    stored = load_file(folder / WEIGHTS)
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(layers[name].lora_B, stored[f"base_model.model.{name}.lora_B.weight"])
    student.seqkd_backward(groups(2, 2))
    student.step()
    assert not torch.equal(layers[name].lora_B, stored[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of the kind IA3"),
        ({"use_dora": True}, "an adapter with use_dora = True"),
        ({"bias": "all"}, "an adapter with bias = 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "an adapter with rank_pattern"),
        ({"r": 4}, r"as \[2, 64\], the student's is \[4, 64\]"),
    ],
)
def test_an_adapter_that_computes_something_else_is_told(spec, tmp_path, changes, message) -> None:
    folder = of_peft(tmp_path / "theirs", **changes)
    with pytest.raises(UserError, match=message):
        Student.load(spec, StudentSettings(adapter="lora", adapter_from=str(folder)), device="cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "is no folder of an adapter: it has no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "cannot read"),
        (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "is damaged"),
        (lambda f: rename(f, "q_proj.lora_A", "wq.lora_A"), "names .*wq, which is no linear layer"),
        (lambda f: rename(f, "layers.1", "layers.7"), "names .*layers.7.* which is no linear layer"),
        (lambda f: rename(f, "layers.1.self_attn.v_proj.lora_A.weight", "x"), "holds model.x, for which the student"),
    ],
)
def test_a_damaged_folder_is_told(spec, tmp_path, damage, message) -> None:
    folder = of_peft(tmp_path / "theirs")
    damage(folder)
    with pytest.raises(UserError, match=message):
        Student.load(spec, StudentSettings(adapter="lora", adapter_from=str(folder)), device="cpu")


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace(old, new): tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)


def test_half_an_adapter_is_told(spec, tmp_path) -> None:
    folder = of_peft(tmp_path / "theirs")
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {n: t.clone() for n, t in tensors.items() if not n.endswith("1.self_attn.q_proj.lora_B.weight")},
        folder / WEIGHTS,
    )
    with pytest.raises(UserError, match=r"lacks model.layers.1.self_attn.q_proj.lora_B .*not whole"):
        Student.load(spec, StudentSettings(adapter="lora", adapter_from=str(folder)), device="cpu")


@pytest.mark.parametrize("setting", [{"adapter_rank": 4}, {"adapter_alpha": 1.0}, {"adapter_targets": "q_proj"}])
def test_settings_that_its_folder_contradicts_are_told(spec, tmp_path, setting) -> None:
    folder = of_peft(tmp_path / "theirs")
    (key,) = setting
    with pytest.raises(UserError, match=f"leave student.{key} out"):
        Student.load(spec, StudentSettings(adapter="lora", adapter_from=str(folder), **setting), device="cpu")


def test_peft_reads_ours_and_we_train_on_peft_s(spec, roles, folders, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        student = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(spec.path), folders[0] / "adapter"
        )
        torch.testing.assert_close(logits(student.eval()), logits(roles[0].model), rtol=1e-4, atol=1e-4)
        plain = AutoModelForSequenceClassification.from_pretrained(spec.path, num_labels=1)
        scorer = peft.PeftModel.from_pretrained(plain, folders[1] / "adapter").eval()
        torch.testing.assert_close(logits(scorer), logits(roles[1].model), rtol=1e-4, atol=1e-4)
        loaded = AutoModelForCausalLM.from_pretrained(spec.path)
        loaded.load_adapter(str(folders[0] / "adapter"))
        torch.testing.assert_close(logits(loaded), logits(roles[0].model), rtol=1e-4, atol=1e-4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(spec.path), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Student.load(spec, StudentSettings(adapter="lora", adapter_from=str(tmp_path / "theirs")), device="cpu")
    assert len(adapted_layers(ours.model)) == 14
    torch.testing.assert_close(logits(ours.model), logits(theirs.eval()), rtol=1e-4, atol=1e-4)


def test_the_metadata_of_a_folder(roles, folders) -> None:
    student, scorer = (json.loads((place / "adapter" / CONFIG).read_text()) for place in folders)
    # rsLoRA's scale as a plain one: alpha / sqrt(rank) = 8 / 2.
    assert (student["r"], student["lora_alpha"], student["use_rslora"]) == (4, 16.0, False)
    assert student["task_type"] == "CAUSAL_LM" and student["modules_to_save"] is None
    assert scorer["task_type"] == "SEQ_CLS" and scorer["modules_to_save"] == ["score"]
    assert len(student["target_modules"]) == 4
    write_adapter(roles[0].model, folders[0] / "adapter")
