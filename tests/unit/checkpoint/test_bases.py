"""What a checkpoint says of the base under its adapters, and what is told where another one is there."""

from __future__ import annotations

import pytest
import torch

from gadcore.checkpoint import bases
from gadcore.errors import UserError
from tests.support.adapters import on_base, tiny_base
from tests.support.tiny import tiny_model

NAMES = {"student": "mine", "discriminator": "mine"}


def described(base=None, **adapter):
    student, discriminator = on_base(base or tiny_base("llama", torch.float32), dtype=torch.float32, **adapter)
    return bases.describe({"student": student.model, "discriminator": discriminator.model})


def test_the_same_base_passes_whatever_its_adapters_have_learned() -> None:
    one, other = described(values=True), described(values=False)
    assert one == other and set(one) == {"student", "discriminator"}
    bases.check(one, other, NAMES)


def test_models_without_adapters_have_no_base() -> None:
    assert bases.describe({"student": tiny_model()}) == {}
    bases.check(None, {}, NAMES)
    bases.check({}, {}, NAMES)


def test_another_base_is_told_by_one_bit() -> None:
    base = tiny_base("llama", torch.float32)
    before = described(base)
    with torch.no_grad():
        next(base._model.parameters())[3, 5] += 1e-3
    with pytest.raises(
        UserError, match=r"adapters of the student were trained on the base .* give the base of the run"
    ):
        bases.check(before, described(base), NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "has adapters of rank 8, this run's student.adapter_rank is 4"),
        ({"scale": 1.0}, "with a scale of 1, student.adapter_alpha .* make 2"),
        ({"layers": ["x"]}, "stand beside other layers"),
    ],
)
def test_other_adapters_are_told(change, message) -> None:
    here = described()
    with pytest.raises(UserError, match=message):
        bases.check({**here, "student": {**here["student"], **change}}, here, NAMES)


def test_a_run_that_trained_all_of_it_is_told() -> None:
    here = described()
    with pytest.raises(UserError, match=r"a run with student.adapter = none, this one has student.adapter = lora"):
        bases.check(None, here, NAMES)
    with pytest.raises(UserError, match=r"a run with student.adapter = lora, this one has student.adapter = none"):
        bases.check(here, {}, NAMES)
