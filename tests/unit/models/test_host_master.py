"""Masters in host memory: AdamW in float32 to the bit, beside weights that are the masters rounded."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench.offline.cuda_standin import gpu
from gadcore.config.loading import load
from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.errors import UserError
from gadcore.models.discriminator import Discriminator
from gadcore.models.host_master import HostMaster
from gadcore.models.optim import Optimizer
from gadcore.models.state import optimizer_tensors, restore_optimizer, restore_parameters
from gadcore.models.student import Student
from gadcore.rollout.weights import PlainWeights
from tests.support.builders import groups, response
from tests.support.tiny import save_tiny, tiny_model

SETTINGS = StudentSettings(master="host", lr=1e-3, weight_decay=0.1, grad_clip=0.3)
# Several slices in most parameters, and several parameters in most slices.
SLICE = 2048


def pair(model: nn.Module, **changes) -> tuple[HostMaster, Optimizer]:
    """An optimizer with masters in host memory, and one in float32 over the same values."""
    settings = SETTINGS.model_copy(update=changes)
    plain = Optimizer(copy.deepcopy(model), settings, lr=settings.lr, owner="student")
    return HostMaster(model, settings, lr=settings.lr, owner="student", slice_numbers=SLICE), plain


def give_gradients(ours: HostMaster, plain: Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for p, wide in zip(ours.parameters, plain.parameters, strict=True):
        # Odd numbers of zeros: a parameter's gradient may be missing.
        if p.dim() == 1 and seed % 2:
            continue
        wide.grad = torch.randn(p.shape)
        p.grad = wide.grad.to(p.device, copy=True)


def masters(ours: Optimizer) -> list[torch.Tensor]:
    return list(ours.weights({str(i): p for i, p in enumerate(ours.parameters)}).values())


def assert_same(ours: HostMaster, plain: Optimizer) -> None:
    for p, master, wide in zip(ours.parameters, masters(ours), plain.parameters, strict=True):
        assert master.dtype == torch.float32 and torch.equal(master, wide)
        assert torch.equal(p.detach().cpu(), wide.to(p.dtype))
        states = (optimizer.adamw.state.get(key, {}) for optimizer, key in ((ours, master), (plain, wide)))
        here, there = ({name: value.clone() for name, value in state.items()} for state in states)
        for name, value in there.items():
            assert torch.equal(here[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_masters_are_adamw_in_float32_to_the_bit(tied) -> None:
    ours, plain = pair(tiny_model("qwen2", tied=tied))
    assert {p.dtype for p in ours.parameters} == {torch.bfloat16} and ours.moments() == []
    for step in range(5):
        for optimizer in (ours, plain):
            optimizer.set_lr(1e-3 / (step + 1))
        give_gradients(ours, plain, step)
        assert ours.step() == plain.step()
        assert_same(ours, plain)
        assert all(p.grad is None for p in ours.parameters)
    assert 5 in {int(state["step"]) for state in ours.adamw.state.values()}


def test_slices_go_through_a_gpu_and_nothing_reads_what_is_not_there_yet() -> None:
    settings, plain = SETTINGS, Optimizer(tiny_model(), SETTINGS, lr=1e-3, owner="student")
    with gpu(total=64 << 20) as device:
        ours = HostMaster(tiny_model().to("cuda"), settings, lr=1e-3, owner="student", slice_numbers=SLICE)
        assert all(p.is_cuda for p in ours.parameters) and not any(m.is_cuda for m in masters(ours))
        assert device.pinned_bytes == 3 * 4 * len(ours._host[0])
        for step in range(3):
            give_gradients(ours, plain, step)
            assert ours.step() == plain.step()
            assert_same(ours, plain)
        before = device.allocator.allocated
        give_gradients(ours, plain, 4)
        device.allocator.reset_peak()
        ours.step()
        gradients = sum(4 * p.numel() for p in ours.parameters)
        # Two slices of weights and both moments, and some numbers for the norm.
        assert device.allocator.most_allocated - before - gradients < 2 * 3 * 4 * SLICE + (64 << 10)
        del ours
        gc.collect()
        assert device.pinned_bytes == 0


def student(path: str, **settings) -> Student:
    return Student.load(
        path, StudentSettings(**settings), AlgorithmSettings(kl_coef=0.05), device="cpu", micro_batch_tokens=60
    )


def test_gradients_of_many_micro_batches_are_summed_in_float32(tmp_path) -> None:
    path, batch = str(save_tiny(tmp_path)), groups(6, 4)
    ours = student(path, master="host")
    micros: list[dict[str, torch.Tensor]] = []
    for p in ours.model.parameters():
        assert p.dtype == torch.bfloat16
    head = ours.model.model.layers[0].mlp.down_proj.weight
    head.register_hook(lambda grad: micros.append(grad.clone()))
    ours.seqkd_backward(batch)
    assert len(micros) > 3 and head.grad.dtype == torch.float32
    # The hook sees them as autograd casts them for the sum.
    exact = sum(m.float() for m in micros)
    assert torch.equal(head.grad, exact)
    narrow = torch.zeros_like(head)
    for m in micros:
        narrow += m.to(torch.bfloat16)
    assert not torch.equal(narrow.float(), exact)


def test_updates_that_bfloat16_loses_add_up_in_the_master(tmp_path) -> None:
    path, batch = str(save_tiny(tmp_path)), groups(3, 3)
    host, narrow = student(path, master="host"), student(path, dtype="bfloat16")
    before = {name: p.clone() for name, p in host.model.named_parameters()}
    for _ in range(8):
        for each in (host, narrow):
            each.seqkd_backward(batch)
            each.step(1e-5)
    name = "model.layers.0.mlp.down_proj.weight"
    here, lost = dict(host.model.named_parameters()), dict(narrow.model.named_parameters())
    changed = (here[name] != before[name]).float().mean()
    assert changed > 3 * (lost[name] != before[name]).float().mean()
    master = host.optimizer.weights(here)[name]
    assert torch.equal(here[name], master.bfloat16()) and not torch.equal(master.bfloat16().float(), master)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    ours, plain = pair(tiny_model())
    give_gradients(ours, plain, 0)
    ours.parameters[0].grad[0, 0] = float("nan")
    with pytest.raises(UserError, match="the gradient of the student is not finite"):
        ours.step()
    assert_same(ours, plain)


def test_masters_and_moments_come_back_to_the_bit() -> None:
    torch.manual_seed(3)
    ours, plain = pair(tiny_model())
    names = lambda optimizer: {f"p{i}": p for i, p in enumerate(optimizer.parameters)}  # noqa: E731
    for step in range(3):
        give_gradients(ours, plain, step)
        ours.step(), plain.step()
    weights = ours.weights(names(ours))
    saved = {name: value.clone() for name, value in weights.items()}
    moments = {name: value.clone() for name, value in optimizer_tensors(ours.adamw, weights).items()}
    other, _ = pair(tiny_model(seed=9))
    theirs = other.weights(names(other))
    restore_parameters(theirs, saved, "student")
    other.weights_changed()
    restore_optimizer(other.adamw, moments, theirs)
    assert_same(other, plain)
    give_gradients(other, plain, 4)
    assert other.step() == plain.step()
    assert_same(other, plain)
    # And what another optimizer keeps is what this one goes on with: they save the same.
    assert optimizer_tensors(plain.adamw, names(plain)).keys() == moments.keys()


def test_the_sampler_gets_what_the_model_computes_with_and_a_directory_the_masters(tmp_path) -> None:
    ours = student(str(save_tiny(tmp_path / "model")), master="host")
    ours.seqkd_backward(groups(3, 3))
    ours.step(1e-4)
    parameters = dict(ours.model.named_parameters())
    weights = ours.optimizer.weights(parameters)
    for name, value in PlainWeights(ours.model):
        assert value.dtype == torch.bfloat16 and torch.equal(value, weights[name].bfloat16())
    ours.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() <= weights.keys() and saved
    for name, value in saved.items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[name]), name
    again = student(str(tmp_path / "saved"), master="host")
    assert all(torch.equal(p, parameters[name]) for name, p in again.model.named_parameters())


def test_a_discriminators_head_stays_in_float32(tmp_path) -> None:
    path, batch = str(save_tiny(tmp_path)), groups(3, 3)
    d = Discriminator.load(path, DiscriminatorSettings(master="host", lr=1e-6), device="cpu")
    wide = {name for name, p in d.model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"score.weight"}
    before = d.model.score.weight.detach().clone()
    scores = d.score(batch, backward=True)
    assert scores.sample_scores.dtype == torch.float32
    d.step()
    moved = d.model.score.weight - before
    # A step of 1e-6, of which bfloat16 would keep nothing.
    assert (moved != 0).all() and moved.abs().max() < 2e-6


def test_the_reference_policy_is_what_the_model_computes_with(tmp_path) -> None:
    ours, batch = student(str(save_tiny(tmp_path)), master="host"), groups(2, 3)
    ours.freeze_reference()
    stats = ours.grpo_backward(batch, torch.arange(6.0))
    assert stats.kl == 0 and ours.step(1e-3) > 0
    ours.grpo_backward(batch, torch.arange(6.0))
    assert response("Paris.").token_ids and ours.step(1e-3) > 0


def test_masters_are_float32() -> None:
    with pytest.raises(UserError, match=r"student.master = host .*student.dtype = bfloat16 asks for others"):
        load(["--student.master", "host", "--student.dtype", "bfloat16"])
