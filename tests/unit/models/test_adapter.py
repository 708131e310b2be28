"""Adapters on a frozen base: what is trained, what is shared, and what must not get lost without a word."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.config.adapter import LoRA
from gadcore.config.settings import Config, DiscriminatorSettings, StudentSettings
from gadcore.data.groups import GroupedBatch
from gadcore.errors import UserError
from gadcore.kernels import lora_gated_mlp
from gadcore.kernels.lora_linear import LoRALinear, is_adapters, lora_linear, lora_linear_reference
from gadcore.kernels.quantised_linear import layers_of_bits
from gadcore.models import adapter, backbone
from gadcore.models.adapter import adapted_layers, add_adapter, base_parameters, own_parameters
from gadcore.models.shared_base import shares_base
from gadcore.rollout.engine import SampleRequest
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.weights import PlainWeights
from tests.support.adapters import merged, on_base, scorer_on, tiny_base
from tests.support.builders import TEMPLATE, assert_same_gradients, gradients, groups
from tests.support.tiny import tiny_model

FP32 = dict(rtol=1e-4, atol=1e-5)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_layer_and_its_gradients(dtype, tolerance, bias) -> None:
    x, w, b0, a, b, grad = leaves((2, 5, 7), (11, 7), (11,), (3, 7), (11, 3), (2, 5, 11), dtype=dtype)
    frozen = w.detach(), b0.detach() if bias else None
    lora_linear(x, *frozen, a, b, 0.5).backward(grad.detach())
    found = [t.grad.clone() for t in (x, a, b)]
    for t in (x, a, b):
        t.grad = None
    expected = lora_linear_reference(x, *frozen, a, b, 0.5)
    expected.backward(grad.detach())
    torch.testing.assert_close(lora_linear(x, *frozen, a, b, 0.5), expected, rtol=tolerance, atol=tolerance)
    for ours, t in zip(found, (x, a, b), strict=True):
        torch.testing.assert_close(ours, t.grad, rtol=tolerance, atol=tolerance)


def test_what_does_not_fit_is_told() -> None:
    x, w, a, b = leaves((5, 7), (11, 7), (3, 7), (11, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"has A \[r, 7\] and B \[11, r\]"):
        lora_linear(x, w, None, a, b, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        lora_linear(x, w, None, a.double(), b[:, :3], 1.0)


@pytest.mark.native
def test_the_gated_mlp_equals_its_three_layers() -> None:
    x, g, u, d, grad = leaves((9, 6), (10, 6), (10, 6), (6, 10), (9, 6), dtype=torch.float32)
    ag, bg, au, bu, ad, bd = leaves((3, 6), (10, 3), (3, 6), (10, 3), (3, 10), (6, 3), dtype=torch.float32)
    trained = [x, ag, bg, au, bu, ad, bd]
    parts = [(g, ag, bg), (u, au, bu), (d, ad, bd)]
    y = lora_gated_mlp.lora_gated_mlp(x, *(lora_gated_mlp.Adapted(w.detach(), a, b, 0.5) for w, a, b in parts))
    y.backward(grad.detach())
    found = [t.grad.clone() for t in trained]
    for t in trained:
        t.grad = None
    gate, up, down = (w.detach() + 0.5 * b @ a for w, a, b in parts)
    wide = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    wide.backward(grad.detach())
    torch.testing.assert_close(y, wide, **FP32)
    for ours, t in zip(found, trained, strict=True):
        torch.testing.assert_close(ours, t.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "kept"), [("off", "none"), ("selective", "none"), ("full", "none"), ("off", "nf4"), ("selective", "int8")]
)
def test_in_float32_every_mode_gives_the_gradients_of_float64(mode, kept) -> None:
    """Where gated MLPs are one function, and where results of products are kept (an addition in place would break)."""
    batch = groups(3, 3)
    roles = {
        dtype: on_base(tiny_base("llama", dtype, kept=kept), dtype=dtype, mode=m, kl_coef=0.0)
        for dtype, m in ((torch.float32, mode), (torch.float64, "off"))
    }
    for student, discriminator in roles.values():
        scores = discriminator.score(batch, backward=True)
        student.grpo_backward(batch, [[0.5 * i for i in range(len(r))] for r in scores.rewards])
    for ours, wide in zip(*roles.values(), strict=True):
        found = {name: g.double() for name, g in gradients(ours.model).items()}
        for name, expected in gradients(wide.model).items():
            assert (found[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_a_role_that_is_made_later_leaves_the_adapters_of_others_alone() -> None:
    """Fusing replaces the forward passes of linear layers and MLPs: on modules of its own, and never an adapter's."""
    batch = groups(2, 3)
    base = tiny_base("llama", torch.float32)
    student, discriminator = on_base(base, dtype=torch.float32)
    before = discriminator.score(batch).rewards
    scorer_on(base, dtype=torch.float32, values=False)
    assert discriminator.score(batch).rewards == before
    plain = merged(discriminator.model)
    discriminator.model = plain
    for ours, theirs in zip(discriminator.score(batch).rewards, before, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for layer in adapted_layers(student.model).values():
        assert type(layer) is LoRALinear and "forward" not in vars(layer)


def test_a_layer_that_is_computed_again_has_the_adapter_of_its_forward_pass() -> None:
    """Whichever role has computed meanwhile, and on another thread, as CUDA's backward passes are."""
    batch = groups(2, 3)
    student, discriminator = on_base(tiny_base("llama"), mode="full", kl_coef=0.0)
    discriminator.score(batch, backward=True)
    expected = gradients(discriminator.model)
    discriminator.discard()

    (micro,) = discriminator.packed(discriminator.tokens(batch), teacher=True)
    loss = discriminator._score(micro, denominator=6).loss
    student.grpo_backward(batch, [[0.0, 1.0, 2.0]] * 2)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same_gradients(gradients(discriminator.model), expected, rtol=1e-12, atol=1e-14)


def test_a_classifier_on_the_base_has_one_config() -> None:
    """Layers that attend by a copy of it would attend by "sdpa", and score without an error."""
    student, discriminator = on_base(tiny_base("gemma3"))
    config = discriminator.model.config
    assert config.num_labels == 1 and student.model.config is not config
    assert discriminator.model.base_model.config is config
    assert all(layer.self_attn.config is config for layer in discriminator.model.base_model.layers)
    assert config._attn_implementation == backbone.ATTENTION


def test_the_engine_of_hugging_face_samples_with_the_students_adapter_after_a_pass_of_the_discriminator() -> None:
    batch = groups(3, 3)
    student, discriminator = on_base(tiny_base("llama", torch.float32), dtype=torch.float32)
    requests = [SampleRequest(group.prompt.token_ids, 1, 0) for group in batch]
    discriminator.score(batch, backward=True)
    engine = HFEngine(Config(), "", student.model, TEMPLATE)
    plain = HFEngine(Config(), "", merged(student.model), TEMPLATE)
    without = HFEngine(Config(), "", tiny_model("llama"), TEMPLATE)
    ours, theirs, other = (
        [r[0].token_ids for r in e.generate(requests, temperature=0.0, max_tokens=12)] for e in (engine, plain, without)
    )
    assert ours == theirs and ours != other


def test_the_engine_of_hugging_face_knows_its_model_on_a_base_in_few_bits() -> None:
    one, other = (on_base(tiny_base("llama", torch.float32, kept="nf4"), dtype=torch.float32)[0] for _ in range(2))
    engine = HFEngine(Config(), "", one.model, TEMPLATE)
    engine.update_weights(PlainWeights(one.model))
    with pytest.raises(RuntimeError, match="samples from the model it was built with"):
        engine.update_weights(PlainWeights(other.model))


@pytest.mark.native
def test_layers_with_adapters_are_pruned_and_fused() -> None:
    for learner in on_base(tiny_base("llama", torch.float32), dtype=torch.float32):
        assert backbone.is_pruned(learner.model)
        assert all(layer.mlp.forward.__func__.__name__ == "_adapted_mlp" for layer in learner.model.base_model.layers)


class _NewShapes(TorchDispatchMode):
    """Shapes of all tensors that are made inside, but those that look at `parameters`."""

    def __init__(self, parameters) -> None:
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in parameters}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_of_the_base_is_ever_made(dtype) -> None:
    batch = groups(3, 3)
    student, discriminator = on_base(tiny_base("qwen2", dtype), dtype=dtype, kl_coef=0.0)
    frozen = {**base_parameters(student.model), **base_parameters(discriminator.model)}
    shapes = {tuple(p.shape) for p in frozen.values() if p.dim() == 2}
    made = _NewShapes(frozen.values())
    with made:
        discriminator.score(batch, backward=True)
        student.grpo_backward(batch, [[0.0, 1.0, 2.0]] * 3)
    assert not shapes & made.shapes and not {s[::-1] for s in shapes} & made.shapes
    assert all(p.grad is None for p in frozen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["off", "selective"])
def test_no_backward_pass_keeps_a_matrix_that_was_made_of_few_bits(dtype, mode) -> None:
    batch = groups(3, 3)
    student, _ = on_base(tiny_base("qwen2", dtype, kept="nf4"), dtype=dtype, mode=mode, kl_coef=0.0, targets="q_proj")
    shapes = {(layer.out_features, layer.in_features) for layer in layers_of_bits(student.model).values()}
    kept: set[tuple[int, ...]] = set()

    def keep(tensor):
        kept.add(tuple(tensor.shape))
        return tensor

    made = _NewShapes(())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), made:
        student.seqkd_backward(batch)
    # They are made, and none of them waits for the backward pass.
    assert shapes <= made.shapes and not {*shapes, *(s[::-1] for s in shapes)} & kept


def test_few_bits_have_the_cost_of_the_matrices_they_stand_for() -> None:
    """Packed groups are cut by it: as they are cut without."""
    costs = [backbone.cost_of(tiny_base("llama", torch.float32, kept=k)._model) for k in ("none", "int8", "nf4")]
    assert costs[0] == costs[1] == costs[2]


def test_four_bits_on_a_gpu_without_their_package_are_told(monkeypatch) -> None:
    settings = StudentSettings(adapter="lora", adapter_base="nf4")
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"student.adapter_base = nf4 needs the package bitsandbytes on a GPU: pip "):
        adapter.loaded_on(settings, torch.device("cuda"), "student")
    # Quantised where there is room for all of it.
    monkeypatch.setattr(adapter, "find_spec", lambda name: object())
    assert adapter.loaded_on(settings, torch.device("cuda"), "student") == torch.device("cpu")
    assert adapter.loaded_on(StudentSettings(adapter="lora"), torch.device("cuda"), "student").type == "cuda"


def test_a_matrix_that_has_no_four_bits_is_told() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(63, 64)
    settings = DiscriminatorSettings(adapter="lora", adapter_base="nf4")
    with pytest.raises(
        UserError, match=r"discriminator.adapter_base = nf4 .* model.layers.1.self_attn.o_proj has rows"
    ):
        adapter.quantise_base(model, settings, torch.device("cpu"), "discriminator")


def test_steps_reach_every_adapter_and_leave_the_base_alone() -> None:
    batch = groups(3, 3)
    base = tiny_base("llama", torch.float32)
    student, discriminator = on_base(base, dtype=torch.float32, values=False, lr=1e-2)
    student.freeze_reference()
    frozen = {name: p.detach().clone() for name, p in base_parameters(student.model).items()}
    learners = student, discriminator
    before = [{n: p.detach().clone() for n, p in own_parameters(m.model).items()} for m in learners]
    first = student.reference_logprobs(batch)
    for _ in range(2):
        rewards = discriminator.update(batch).rewards
        student.grpo_backward(batch, [[r + i for i, r in enumerate(row)] for row in rewards])
        student.step()
    for learner, values in zip(learners, before, strict=True):
        own = own_parameters(learner.model)
        assert own.keys() == values.keys() and len(own) == len(learner.optimizer.parameters)
        assert {name for name in own if not is_adapters(name)} <= {"score.weight"}
        assert not [name for name, p in own.items() if torch.equal(p, values[name])]
    for name, p in base_parameters(student.model).items():
        assert torch.equal(p, frozen[name]), name
        assert dict(discriminator.model.named_parameters()).get(name, p) is p
        assert dict(student.reference.named_parameters())[name] is p
    # The reference is the student as it was, its adapter a copy.
    assert torch.equal(student.reference_logprobs(batch), first)
    (micro,) = student.packed(student_tokens(batch), teacher=False)
    assert not torch.equal(student.logprobs(student.model, micro.tokens, 0.8).detach(), first)


def student_tokens(batch):
    from gadcore.models.student import _sampled

    return _sampled(batch)


def test_a_new_adapter_changes_nothing_and_depends_on_seed_and_role() -> None:
    base = tiny_base("llama", torch.float32)
    settings = StudentSettings(adapter="lora", adapter_rank=4)
    one, again, other = (base.policy(settings, seed=seed) for seed in (0, 0, 1))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, tiny_model("llama")(ids).logits)
    name = "model.layers.1.mlp.up_proj.lora_A"
    assert torch.equal(one.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    drawn = one.get_parameter(name)
    # Uniform between +-1 / sqrt(in_features), as nn.Linear and peft draw.
    assert drawn.abs().max() <= 1 / 8 and drawn.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("targets", "count"),
    [((), 14), (("q_proj", "v_proj"), 4), (("self_attn.o_proj",), 2), (("model.layers.1.mlp.up_proj",), 1)],
)
def test_targets_are_named_as_peft_names_them(targets, count) -> None:
    names = add_adapter(tiny_model(), LoRA(2, 4.0, targets), torch.float32, owner="student")
    assert len(names) == count


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(2, 4.0, ("q_proj", "wqkv")), "student.adapter_targets names wqkv, .* there are down_proj, gate_proj"),
        # "all-linear" is the decoder layers': a head is none of them.
        (LoRA(2, 4.0, ("lm_head",)), "names lm_head"),
    ],
)
def test_an_adapter_without_a_place_is_told(lora, message) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(tiny_model(), lora, torch.float32, owner="student")


def test_who_shares_a_base() -> None:
    lora = dict(adapter="lora")
    student, scorer = StudentSettings(**lora), DiscriminatorSettings(**lora)
    assert shares_base(student, scorer, same_model=True)
    assert not shares_base(student, scorer, same_model=False)
    assert not shares_base(StudentSettings(), scorer, same_model=True)
    assert not shares_base(student, DiscriminatorSettings(**lora, autocast="bfloat16"), same_model=True)
    few = DiscriminatorSettings(**lora, adapter_base="nf4")
    assert not shares_base(student, few, same_model=True)
    assert shares_base(StudentSettings(**lora, adapter_base="nf4"), few, same_model=True)


def test_under_autocast_adapters_are_float32_on_a_base_in_bfloat16() -> None:
    settings = StudentSettings(adapter="lora", adapter_rank=4, autocast="bfloat16")
    assert settings.weights_dtype == "bfloat16"
    model = tiny_base("llama", torch.bfloat16).policy(settings)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        assert (layer.lora_A.dtype, layer.weight.dtype) == (torch.float32, torch.bfloat16)
    ids = torch.arange(40)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        model(ids).logits.float().square().mean().backward()
    # As Hugging Face's generate() calls it.
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in own_parameters(model).values())


def test_a_packed_pass_of_the_reference_keeps_nothing() -> None:
    student, _ = on_base(tiny_base("llama"))
    student.freeze_reference()
    tokens = student_tokens(groups(2, 2))
    states = backbone.predicting_states(student.reference, GroupedBatch.of(tokens, last_tokens=False))
    assert not states.requires_grad
