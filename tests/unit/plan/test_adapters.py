"""Plans of runs whose models are adapters on frozen bases, against the real code without weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gadcore.config.adapter import LoRA, lora_of
from gadcore.config.loading import load
from gadcore.memory.holdings import NEEDS
from gadcore.models.adapter import add_adapter, base_parameters, own_parameters
from gadcore.plan.dimensions import find_config, read_dimensions
from gadcore.plan.disk import disk_of
from gadcore.plan.memory import Choice, holdings, state_memory
from gadcore.plan.roles import adapter_entries
from tests.support.plan_cases import preset_case

H100 = "h100-80gb-x1"
QWEN = "Qwen/Qwen2.5-14B-Instruct"


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_entries_are_those_of_the_real_model(targets) -> None:
    config = AutoConfig.from_pretrained(str(find_config(QWEN)))
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2] if config.layer_types else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoRA(64, 128.0, targets)
    whole = sum(p.numel() for p in model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        # No values: nothing to draw.
        patch.setattr("gadcore.kernels.lora_linear.LoRALinear.draw", lambda self, generator: None)
        add_adapter(model, lora, torch.float32, owner="student")
    d = read_dimensions(QWEN)
    assert sum(p.numel() for p in own_parameters(model).values()) == adapter_entries(d, lora) * 2 // d.layers
    assert sum(p.numel() for p in base_parameters(model).values()) == whole


def test_the_base_is_held_once_by_every_state() -> None:
    case = preset_case("qwen2.5-14b-lora", H100)
    choice = Choice("full", 4096, 1e9)
    base = 2.0 * case.student.parameters
    assert lora_of(case.config.student) == LoRA(64, 128.0)
    for state in NEEDS:
        assert state_memory(case, choice, state).held["base.parameters"] == base
    sizes = holdings(case, choice)
    # float32 A and B, their gradients and both moments; the reference is a copy of A and B.
    a = 4.0 * adapter_entries(case.student, LoRA(64, 128.0))
    assert sizes["student.parameters"] == sizes["reference.parameters"] == sizes["student.gradients"] == a
    assert sizes["student.optimizer"] == 2 * a
    assert sizes["discriminator.parameters"] == a + 4 * case.student.hidden
    # vLLM's copy of the base on CUDA.
    assert sizes["engine.weights"] == base


def test_two_bases_are_two() -> None:
    other = ["--discriminator.model", "Qwen/Qwen2.5-3B-Instruct"]
    case = preset_case("qwen2.5-14b-lora", H100, *other)
    assert case.base_bytes == 2 * case.student.parameters + 2 * (case.discriminator.scalar_parameters - 2048)
    none = ["--discriminator.adapter", "none", "--discriminator.adapter_rank", "none"]
    full = preset_case("qwen2.5-14b-lora", H100, *other, *none)
    assert full.base_bytes == 2 * case.student.parameters


def test_no_gradient_of_the_head_is_planned() -> None:
    choice = Choice("full", 4096, 1e9)
    lora = state_memory(preset_case("qwen2.5-14b-lora", H100), choice, "student").working
    full = state_memory(preset_case("qwen2.5-14b", H100), choice, "student").working
    d = read_dimensions(QWEN)
    assert sum(lora.values()) < sum(full.values()) - 2 * d.head


def test_checkpoints_are_small_and_the_saved_models_whole() -> None:
    d = read_dimensions(QWEN)
    lora, full = (disk_of(load(["--preset", name]), d, d, (4,)) for name in ("qwen2.5-14b-lora", "qwen2.5-14b"))
    assert lora.checkpoint < full.checkpoint / 40
    assert lora.models > 4 * d.parameters
