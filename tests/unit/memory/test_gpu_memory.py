"""What a GPU's memory would hold, counted on a CPU: set-up, states and loads ahead beside a caching allocator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gadcore.config.settings import DiscriminatorSettings, MemorySettings, StudentSettings
from gadcore.errors import UserError
from gadcore.memory import colocation
from gadcore.memory.arena import Arena
from gadcore.memory.colocation import Colocation
from gadcore.memory.ledger import ALLOCATOR, Ledger
from gadcore.memory.tiers import FileTier
from gadcore.models.discriminator import Discriminator
from gadcore.models.learner import Learner
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from gadcore.train.build import _hand_over
from tests.support.device_bytes import DeviceBytes, HostTier, bytes_of
from tests.support.tiny import save_tiny

CPU = torch.device("cpu")
# One stands for a GB of the audit's 3B on 80 GB.
UNIT = 4096


@pytest.fixture(autouse=True)
def host_tiers(monkeypatch):
    monkeypatch.setattr(colocation, "make_tier", lambda name, device, folder, holding, size: HostTier(size))


@pytest.fixture
def device():
    with DeviceBytes(80 * UNIT) as device:
        yield device


@pytest.fixture
def memory(device):
    """A 3B beside a discriminator of its size: parameters 12, moments 24, in fp32."""
    memory = Colocation(CPU, MemorySettings(offload="file"), Path(), shared=False, meter=device)
    for model in ("student", "discriminator"):
        for what, size in (("optimizer", 24), ("parameters", 12)):
            held = [torch.zeros(size * UNIT, dtype=torch.uint8)]
            memory.add(f"{model}.{what}", lambda held=held: held)
    reference = [torch.zeros(6 * UNIT, dtype=torch.uint8)]
    memory.add("reference.parameters", lambda: reference, frozen=True)
    memory.begin()
    return memory


def step(memory: Colocation, work: dict[str, int]) -> None:
    for state in ("synchronise", "rollout", "discriminator", "discriminator_update", "reference", "student",
                  "student_update"):  # fmt: skip
        memory.enter(state)  # type: ignore[arg-type]
        # Gradients and activations, freed by the state's end: the allocator keeps them.
        del_me = torch.zeros(work.get(state, 0) * UNIT, dtype=torch.uint8)
        del del_me


def test_tensors_are_handed_over_without_a_second_copy(device, tmp_path) -> None:
    held = [torch.full((1 << 16,), i, dtype=torch.int32) for i in range(16)]
    before = [t.clone().numpy() for t in held]
    device.give_back()
    whole, arena = bytes_of(held), None
    device.peak_live = device.live
    arena = Arena("x", held, lambda size: FileTier(tmp_path, "x", size))
    assert arena.bytes == whole and not arena.resident
    # What is counted beside the tensors is a view's empty storage.
    assert device.peak_live <= device.live + whole and all(t.numel() == 0 for t in held)
    arena.come()
    assert all((t.numpy() == b).all() for t, b in zip(held, before, strict=True))
    arena.close()


@pytest.mark.parametrize("states", ["discriminator", "student"])
def test_what_a_state_works_with_is_learnt_beside_a_cache(memory, device, states) -> None:
    work = {"discriminator": 30, "discriminator_update": 2, "student": 28, "reference": 5}
    for _ in range(3):
        step(memory, work)
        memory.observe()
        assert memory.ledger.work[states] >= work[states] * UNIT
        assert memory.ledger.work[states] <= (work[states] + 1) * UNIT
    assert memory.ledger.work["synchronise"] < UNIT


@pytest.mark.parametrize(("work", "comes"), [(30, True), (38, False), (45, False)])
def test_nothing_comes_ahead_where_a_state_needs_the_room(memory, device, work, comes) -> None:
    """Of 80: D's parameters 12 and work 30 leave room for its moments of 24; beside work 38 too little would be spare,
    45 would fail."""
    for _ in range(3):
        step(memory, {"discriminator": work})
    for state in ("synchronise", "rollout", "discriminator"):
        memory.enter(state)
    assert (memory._arenas["discriminator.optimizer"].device_bytes > 0) == comes
    assert device.in_use() + work * UNIT <= device.limit, "the discriminator's pass would run out of memory"


def test_what_came_ahead_and_is_not_followed_is_given_back(memory, device) -> None:
    """The gate's extra steps, critic_warmup, the convergence rule and evaluations leave a step's order."""
    for _ in range(2):
        step(memory, {})
    for state in ("synchronise", "rollout", "discriminator"):
        memory.enter(state)
    coming = memory._arenas["discriminator.optimizer"]
    assert coming.device_bytes == 24 * UNIT and coming.tier.loading and not coming.resident
    memory.enter("synchronise")
    assert coming.device_bytes == 0 and not coming.tier.loading
    assert memory.ledger.held == {"student.parameters": 12 * UNIT, "process": device.context} | {
        name: size for name, size in memory.ledger.held.items() if name == ALLOCATOR
    }
    memory.enter("rest")
    assert device.live < UNIT


def test_a_cache_counts_once(device) -> None:
    ledger = Ledger(100)
    ledger.update({"student.parameters": 40, ALLOCATOR: 30})
    ledger.seen("student", peak=75)
    assert ledger.work["student"] == 35 and ledger.needed(35) == 75 and ledger.needed(10) == 70
    ledger.check("student")
    ledger.update({"student.parameters": 66})
    with pytest.raises(UserError, match="state student needs"):
        ledger.check("student")
    assert "allocator" not in ledger.over(35) and "allocator" in ledger.over(0)


@pytest.fixture
def spec(tmp_path) -> ModelSpec:
    return ModelSpec.resolve(str(save_tiny(tmp_path / "model")))


def test_models_are_handed_over_one_by_one(spec) -> None:
    """Parameters and moments of one model at a time: less than its optimizer step has, which has gradients too."""
    device = DeviceBytes()
    memory = Colocation(CPU, MemorySettings(offload="file"), Path(), shared=False, meter=device)
    options = dict(device="cpu", micro_batch_tokens=64, activation_checkpointing="off")

    def student() -> Learner:
        return Student.load(spec, StudentSettings(), **options)

    def discriminator() -> Learner:
        return Discriminator.load(spec, DiscriminatorSettings(), student=spec, **options)

    made = []
    for make in (student, discriminator):
        with device:
            before = device.live
            model = make()
            for p in model.model.parameters():
                # Read into the host's memory, then moved.
                p.data = p.data.clone()
            parameters = bytes_of(model.model.parameters())
            device.peak_live = device.live
            _hand_over(memory, model)
        made.append(model)
        assert 2.9 * parameters < device.peak_live - before < 3.1 * parameters
        assert device.live - before < 0.1 * parameters, "it has left"
        assert device.kept() < 0.1 * parameters, "for whoever looks at what is free"
    with memory.there("student.parameters"):
        assert all(p.numel() for p in made[0].model.parameters())
    assert not any(p.numel() for p in made[0].model.parameters())


def test_the_reference_is_made_of_values_that_wait(spec) -> None:
    device = DeviceBytes()
    memory = Colocation(CPU, MemorySettings(offload="file"), Path(), shared=False, meter=device)
    student = Student.load(spec, StudentSettings(), device="cpu", micro_batch_tokens=64, activation_checkpointing="off")
    parameters = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    _hand_over(memory, student)
    with device:
        student.freeze_reference(memory.readable(dict(student.model.named_parameters())))
        assert student.reference is not None
        assert device.peak_live <= 1.1 * bytes_of(parameters.values())
        for name, p in student.reference.named_parameters():
            assert torch.equal(p, parameters[name]) and not p.requires_grad
        memory.add("reference.parameters", student.reference.parameters, frozen=True)
        assert device.live < 0.1 * bytes_of(parameters.values())
