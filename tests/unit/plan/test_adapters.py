"""Plans of runs whose models are adapters on frozen bases, against the real code without weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gadcore.config.adapter import LoRA, lora_of
from gadcore.config.loading import load
from gadcore.config.settings import StudentSettings
from gadcore.kernels.quantised_linear import layers_of_bits
from gadcore.memory.holdings import NEEDS
from gadcore.models.adapter import add_adapter, base_parameters, own_parameters, quantise_base
from gadcore.plan.dimensions import find_config, read_dimensions
from gadcore.plan.disk import disk_of
from gadcore.plan.memory import Choice, holdings, state_memory
from gadcore.plan.planning import make_plan
from gadcore.plan.roles import adapter_entries, role_of
from gadcore.plan.show import _notes
from gadcore.plan.time import Pass, optimizer_seconds, pass_seconds, synchronise_seconds
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


def test_the_base_is_held_once_by_every_state_but_that_of_a_sampler_with_its_own() -> None:
    case = preset_case("qwen2.5-14b-lora", H100)
    choice = Choice("full", 4096, 1e9)
    base = 2.0 * case.student.parameters
    assert lora_of(case.config.student) == LoRA(64, 128.0)
    for state in NEEDS:
        assert state_memory(case, choice, state).held.get("base.parameters", 0) == base * (state != "rollout")
    sizes = holdings(case, choice)
    # float32 A and B, their gradients and both moments; the reference is a copy of A and B.
    a = 4.0 * adapter_entries(case.student, LoRA(64, 128.0))
    assert sizes["student.parameters"] == sizes["reference.parameters"] == sizes["student.gradients"] == a
    assert sizes["student.optimizer"] == 2 * a
    assert sizes["discriminator.parameters"] == a + 4 * case.student.hidden
    # vLLM's copy of the base on CUDA.
    assert sizes["engine.weights"] == base


@pytest.mark.parametrize("kept", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-3B-Instruct"])
def test_bytes_of_a_base_in_few_bits_are_those_of_the_real_model(name, kept) -> None:
    config = AutoConfig.from_pretrained(str(find_config(name)))
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2] if config.layer_types else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    d = read_dimensions(name)
    left_out = sum(p.numel() for p in model.model.layers[0].parameters()) * (d.layers - 2)
    settings = StudentSettings(adapter="lora", autocast="bfloat16", adapter_base=kept)
    quantise_base(model, settings, torch.device("meta"), "student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gadcore.kernels.lora_linear.LoRALinear.draw", lambda self, generator: None)
        add_adapter(model, LoRA(16, 32.0), torch.float32, owner="student")
    role = role_of(replace(d, layers=2), settings, "student", d.parameters - left_out)
    assert sum(p.nbytes for p in base_parameters(model).values()) == role.frozen
    widest = max(layer.in_features * layer.out_features for layer in layers_of_bits(model).values())
    assert role.made == widest and 0 < role.few < sum(p.numel() for p in model.parameters()) * 2


def test_a_7b_trains_on_a_card_of_24_gb_with_a_base_in_4_bits() -> None:
    case = preset_case("qwen2.5-7b-qlora", "rtx4090-24gb")
    found = make_plan(case)
    assert found.fits
    states = found.memory
    base = states["student"].held["base.parameters"]
    assert 5.4e9 < base < 5.7e9
    # vLLM has a copy in bfloat16, beside which there is no room for the trainer's while it samples.
    assert "base.parameters" not in states["rollout"].held
    assert states["rollout"].held["engine.weights"] == 2 * case.student.parameters
    whole = preset_case("qwen2.5-7b-lora", "rtx4090-24gb")
    assert not make_plan(whole).fits
    made = states["student"].working["a matrix made whole"]
    assert made == 2 * case.student.hidden * case.student.mlp


def test_making_matrices_whole_takes_time() -> None:
    few, plain = (preset_case("qwen2.5-7b-lora", H100, "--student.adapter_base", kept) for kept in ("nf4", "none"))
    work = Pass(1e5, 1e7, 0, 0, True)
    choice = Choice("full", 4096, 1e9)
    seconds = [pass_seconds(case, choice, case.student, "student", work) for case in (few, plain)]
    # 25 micro-batches, three passes, 3 bytes for each of 6.5e9 entries at 2.7e12 bytes/s.
    assert seconds[0] - seconds[1] == pytest.approx(25 * 3 * 3 * 6.525e9 / (0.8 * 3.35e12), rel=0.01)


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


def test_two_cards_hold_a_base_each_and_share_the_tokens() -> None:
    one, two = (preset_case("qwen2.5-14b-lora", f"h100-80gb-x{count}") for count in (1, 2))
    choice = Choice("full", 4096, 1e9)
    for state in NEEDS:
        assert state_memory(two, choice, state) == state_memory(one, choice, state), state
    assert synchronise_seconds(two, choice) == synchronise_seconds(one, choice)
    work = Pass(1e6, 1e9, 1e5, 3, True)
    seconds = [pass_seconds(case, choice, case.student, "student", work) for case in (one, two)]
    assert seconds[1] == pytest.approx(seconds[0] / 2, rel=0.01)
    # float32, by halves there and back, over NVLink.
    updates = [optimizer_seconds(case, case.policy, case.student_precision) for case in (one, two)]
    assert updates[1] - updates[0] == pytest.approx(4 * two.policy.trained / (0.75 * 450e9))
    plans = [make_plan(case) for case in (one, two)]
    assert all(plan.fits and plan.choice.tensor_parallel == 1 for plan in plans)
    assert 0.5 < plans[1].time.total / plans[0].time.total < 0.7
    assert "bases and adapters whole on every rank" in _notes(two, [])[-1]


def test_over_nodes_the_sum_of_gradients_is_as_slow_as_the_network() -> None:
    case = preset_case("qwen2.5-14b-lora", "2x8-h100-80gb")
    near = preset_case("qwen2.5-14b-lora", "h100-80gb-x8")
    updates = [optimizer_seconds(each, each.policy, each.student_precision) for each in (near, case)]
    assert updates[1] > 3 * updates[0]


def test_beside_a_model_with_an_adapter_the_other_one_is_cut() -> None:
    none = ["--discriminator.adapter", "none", "--discriminator.adapter_rank", "none"]
    case = preset_case("qwen2.5-14b-lora", "h100-80gb-x8", *none)
    choice = Choice("full", 4096, 1e9)
    sizes = holdings(case, choice)
    assert sizes["discriminator.parameters"] == 4 * case.discriminator.scalar_parameters / 8
    assert sizes["student.parameters"] == 4 * adapter_entries(case.student, LoRA(64, 128.0))
    gathered = {state: "gathered layers" in state_memory(case, choice, state).working for state in NEEDS}
    assert gathered["discriminator"] and not gathered["student"] and not gathered["reference"]
    assert ", that with an adapter whole on each" in _notes(case, [])[-1]
