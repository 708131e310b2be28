"""The fused backbone computes what the model files compute, in every family."""

from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import gadcore.models.policy_loss as policy_loss
import gadcore.models.student as student_module
from gadcore.cpu.backbone import rotate
from gadcore.kernels.dispatch import Impl
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.models.fused import embed_in_place, fuse_backbone, gradient_in_place
from tests.support.builders import assert_same_gradients, gradients, groups, student
from tests.support.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.native

IDS = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(0))


def run(model):
    out = model(IDS).logits
    model.zero_grad()
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_results_and_gradients(kind) -> None:
    model = tiny_model(kind)
    plain = copy.deepcopy(model)
    norms = 2 + 2 + 1 + (4 if kind == "qwen3" else 8 if kind == "gemma3" else 0)
    # Gemma's MLP has another activation and keeps its own code.
    assert fuse_backbone(model) == norms + (0 if kind == "gemma3" else 2)
    out, grads = run(model)
    expected, wanted = run(plain)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-6)


def test_a_copy_uses_its_own_weights() -> None:
    model = tiny_model()
    fuse_backbone(model)
    other = copy.deepcopy(model)
    before = other(IDS).logits
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(IDS).logits, before)
    assert model(IDS).logits.abs().max() == 0


def rotation_of(model):
    return sys.modules[type(model.model).__module__].apply_rotary_pos_emb


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_rotation(kind) -> None:
    model = tiny_model(kind)
    fuse_backbone(model)
    fuse_backbone(tiny_model(kind))
    fused = rotation_of(model)
    own = fused.args[0]
    assert fused.func is rotate and not isinstance(own, partial)
    shapes = [(1, 4, 9, 16), (1, 2, 9, 16), (1, 9, 16), (1, 9, 16)]
    for dtype, batch in ((torch.float32, 1), (torch.float64, 1), (torch.float32, 2)):
        q, k, cos, sin = (torch.randn(batch, *s[1:], dtype=dtype) for s in shapes)
        calls = [[t.clone().requires_grad_() for t in (q, k)] for _ in range(2)]
        turned, expected = (f(*given, cos, sin) for f, given in zip((fused, own), calls, strict=True))
        (turned[0].sum() - turned[1].square().sum()).backward()
        (expected[0].sum() - expected[1].square().sum()).backward()
        for actual, other in zip(turned, expected, strict=True):
            torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-6)
        for actual, other in zip(*calls, strict=True):
            torch.testing.assert_close(actual.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_a_rotation_of_another_kind_keeps_its_code(monkeypatch) -> None:
    def interleaved(q, k, cos, sin, unsqueeze_dim=1):
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
        return tuple(x * cos.unsqueeze(1) + t * sin.unsqueeze(1) for x, t in zip((q, k), turned, strict=True))

    model = tiny_model()
    for other in (interleaved, lambda q, cos, sin: q):
        monkeypatch.setattr(sys.modules[type(model.model).__module__], "apply_rotary_pos_emb", other)
        fuse_backbone(model)
        assert rotation_of(model) is other


def test_a_norm_of_another_build_keeps_its_code() -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x * self.weight

    holder = torch.nn.Sequential(OddRMSNorm())
    holder.device = torch.device("cpu")
    assert fuse_backbone(holder) == 0
    assert torch.equal(holder(torch.ones(2, 8)), torch.ones(2, 8))


@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_in_place_has_the_same_gradient(tied, padding_idx) -> None:
    model = tiny_model(tied=tied).double()
    model.model.embed_tokens.padding_idx = padding_idx
    plain = copy.deepcopy(model)
    assert embed_in_place(model)
    for each in (model, plain):
        # Twice: the second is added to the first.
        for ids in (IDS, IDS.flip(1) % 50):
            each(ids).logits.square().mean().backward()
    for (name, p), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted.grad, rtol=1e-12, atol=1e-15, msg=name)


def test_an_embedding_in_place_without_gradients() -> None:
    model = tiny_model()
    plain = copy.deepcopy(model)
    embed_in_place(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model.requires_grad_(False)
    assert not model(IDS).logits.requires_grad
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert torch.equal(other(IDS).logits, plain(IDS).logits)


def test_an_embedding_that_scales_keeps_its_code() -> None:
    assert not embed_in_place(tiny_model("gemma3"))


def later_gradients_stay(model: torch.nn.Module) -> bool:
    """Whether autograd does not see the gradients of the layers' matrices in a second pass."""
    fuse_backbone(model)
    seen = []
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    for p in matrices:
        p.register_hook(lambda grad: seen.append(grad is None))
    for _ in range(2):
        model(IDS).logits.square().mean().backward()
    first, second = seen[: len(matrices)], seen[len(matrices) :]
    assert not any(first) and len(second) == len(matrices) and len(set(second)) == 1
    return second[0]


def test_gradients_of_several_processes_are_left_to_autograd(monkeypatch) -> None:
    monkeypatch.setattr("gadcore.cpu.backbone.onednn_is_faster", lambda: True)
    monkeypatch.setattr("gadcore.kernels.cpu.linear.onednn_is_faster", lambda: True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert not embed_in_place(tiny_model())
        assert not later_gradients_stay(tiny_model())
    finally:
        dist.destroy_process_group()
    assert embed_in_place(tiny_model())
    assert later_gradients_stay(tiny_model())


@pytest.mark.parametrize("tied", [True, False])
def test_later_passes_add_the_heads_gradient_in_place(monkeypatch, tied) -> None:
    batch = groups(4, 3, ragged=True)
    rewards = [list(range(len(group.samples))) for group in batch]
    given = []
    real = policy_loss.linear_grpo_loss

    def loss(*args, add_weight_gradient_to, **kwargs):
        given.append(add_weight_gradient_to)
        return real(*args, add_weight_gradient_to=add_weight_gradient_to, **kwargs)

    monkeypatch.setattr(policy_loss, "linear_grpo_loss", loss)
    in_place = student(torch.float32, tied=tied, micro_batch_tokens=40)
    in_place.freeze_reference()
    in_place.grpo_backward(batch, rewards)
    assert len(given) > 1 and given[0] is None
    assert all(added is in_place.model.get_output_embeddings().weight.grad for added in given[1:])

    monkeypatch.setattr(student_module, "gradient_in_place", lambda *_: None)
    apart = student(torch.float32, tied=tied, micro_batch_tokens=40)
    apart.freeze_reference()
    apart.grpo_backward(batch, rewards)
    assert_same_gradients(gradients(in_place.model), gradients(apart.model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float64, "none"), (torch.float32, "bfloat16")])
def test_a_heads_gradient_is_left_to_autograd_elsewhere(dtype, autocast) -> None:
    weight = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    assert gradient_in_place(weight, autocast) is None


def test_a_heads_gradient_of_another_shape_or_implementation_is_refused() -> None:
    def loss(weight: torch.Tensor, add_to: torch.Tensor, impl: Impl) -> None:
        linear_grpo_loss(
            torch.ones(2, 4),
            weight,
            torch.tensor([0, 1]),
            GroupLayout.of([2], teacher=False, lengths=[1, 1]),
            advantages=torch.ones(2),
            ref_logprob=None,
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.0,
            denominator=2,
            add_weight_gradient_to=add_to,
            impl=impl,
        )

    with pytest.raises(ValueError, match=r"add_weight_gradient_to must be float32 \[3, 4\] as weight, is \[2, 4\]"):
        loss(torch.ones(3, 4), torch.zeros(2, 4), "cpu")
    with pytest.raises(ValueError, match='add_weight_gradient_to needs impl="cpu", "reference" would compute'):
        loss(torch.ones(3, 4), torch.zeros(3, 4), "reference")
