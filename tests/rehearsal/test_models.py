"""Student and discriminator on the stand-in GPU: gradients against the CPU's, in every mode and family."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.offline.cuda_standin import gpu
from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.models.activations import choose_mode, free_bytes, set_mode
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student
from tests.support.builders import TEMPLATE, discriminator, gradients, groups
from tests.support.tiny import tiny_model

REWARDS = [[1.0, 2.0], [0.5, 0.0, 1.0]]
MEMORY = 1 << 30


def student_on(device: str, kind: str, autocast: str, mode: str) -> Student:
    return Student(
        tiny_model(kind).to(device),
        StudentSettings(autocast=autocast),
        AlgorithmSettings(kl_coef=0.05),
        temperature=0.8,
        micro_batch_tokens=60,
        activation_checkpointing=mode,
    )


def student_gradients(device: str, kind: str, autocast: str, mode: str) -> dict[str, torch.Tensor]:
    policy = student_on(device, kind, autocast, mode)
    policy.freeze_reference()
    policy.grpo_backward(groups(2, 2, ragged=True), REWARDS)
    policy.seqkd_backward(groups(1))
    return {name: grad.cpu() for name, grad in gradients(policy.model).items()}


def discriminator_gradients(folder, device: str, kind: str, autocast: str, mode: str) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(discriminator(folder, torch.float32, kind=kind).model).to(device)
    judge = Discriminator(
        model,
        TEMPLATE,
        DiscriminatorSettings(autocast=autocast),
        same_vocabulary=True,
        micro_batch_tokens=60,
        activation_checkpointing=mode,
    )
    judge.score(groups(2, 2), backward=True)
    return {name: grad.cpu() for name, grad in gradients(judge.model).items()}


def error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    assert actual.keys() == expected.keys()
    difference = sum((actual[n] - expected[n]).square().sum() for n in expected)
    return float((difference / sum(g.square().sum() for g in expected.values())).sqrt())


# A tiny bfloat16 model is as coarse as this; what its modes compute again must be the same to the bit.
TOLERANCE = {"none": 1e-5, "bfloat16": 0.1}


@pytest.mark.parametrize(
    ("kind", "autocast"), [pytest.param("llama", "none", marks=pytest.mark.slow), ("qwen2", "bfloat16")]
)
def test_gradients_of_the_student(kind, autocast) -> None:
    expected = student_gradients("cpu", kind, "none", "off")
    with gpu(MEMORY):
        found = student_gradients("cuda", kind, autocast, "off")
    assert error(found, expected) < TOLERANCE[autocast]


@pytest.mark.parametrize("autocast", [pytest.param("none", marks=pytest.mark.slow), "bfloat16"])
def test_what_is_computed_again_is_the_same_to_the_bit(autocast) -> None:
    def found(mode: str) -> dict[str, torch.Tensor]:
        policy = student_on("cuda", "llama", autocast, mode)
        policy.seqkd_backward(groups(1))
        return {name: grad.cpu() for name, grad in gradients(policy.model).items()}

    with gpu(MEMORY):
        off, selective, full = map(found, ("off", "selective", "full"))
    for again in (selective, full):
        assert all(torch.equal(again[name], off[name]) for name in off)


@pytest.mark.parametrize(
    ("autocast", "mode"), [("none", "off"), pytest.param("bfloat16", "selective", marks=pytest.mark.slow)]
)
def test_gradients_of_the_discriminator(tmp_path, autocast, mode) -> None:
    expected = discriminator_gradients(tmp_path, "cpu", "llama", "none", "off")
    with gpu(MEMORY):
        found = discriminator_gradients(tmp_path, "cuda", "llama", autocast, mode)
    assert error(found, expected) < TOLERANCE[autocast]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "smollm3")), "gemma3"]
)
def test_gradients_of_other_families(tmp_path, kind) -> None:
    """Norms of queries and keys, norms behind attention and MLP, layers without positions."""
    judged = discriminator_gradients(tmp_path, "cpu", kind, "none", "off")
    with gpu(MEMORY):
        judge = discriminator_gradients(tmp_path, "cuda", kind, "bfloat16", "selective")
    assert error(judge, judged) < 0.1


def test_an_optimizer_step() -> None:
    def stepped(device: str) -> dict[str, torch.Tensor]:
        policy = student_on(device, "llama", "none", "off")
        policy.seqkd_backward(groups(2))
        assert policy.step(1e-2) > 0
        return {name: p.detach().cpu() for name, p in policy.model.named_parameters()}

    expected = stepped("cpu")
    with gpu(MEMORY):
        found = stepped("cuda")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_checkpointing_is_chosen_by_what_is_free() -> None:
    with gpu(64 << 20):
        model = tiny_model().to("cuda")
        free = free_bytes(model.device)
        # The allocator has taken more than the model needs, and counts as free what it keeps.
        assert torch.cuda.mem_get_info()[0] < free == (64 << 20) - torch.cuda.memory_allocated()
        assert set_mode(model, "auto", 100, "bfloat16") == "off"
        rest = torch.empty(free - (2 << 20), dtype=torch.uint8, device="cuda")
        # The gradients alone take most of what is left.
        assert choose_mode(model, 1000) == "full"
        del rest
        assert choose_mode(model, 1000) == "off"
