"""What a checkpoint says of the base under its adapters, and what is told where another one is there."""

from __future__ import annotations

import pytest
import torch

from gadcore.checkpoint import bases
from gadcore.config.settings import StudentSettings
from gadcore.errors import UserError
from gadcore.models.adapter import quantise_base
from gadcore.models.shared_base import SharedBase
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


def test_processes_that_have_loaded_other_bases_are_told() -> None:
    here, there = described(), described(tiny_base(kv_heads=2))
    bases.check_equal([here, here, {**here}])
    bases.check_equal([{}, {}])
    with pytest.raises(UserError, match="rank 2 has loaded other weights for the base of the student than rank 0"):
        bases.check_equal([here, here, there])


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


@pytest.mark.parametrize("kept", ["int8", "nf4"])
def test_a_base_in_few_bits_is_known_by_the_weights_it_was_made_of(kept) -> None:
    plain, few = described(), described(tiny_base("llama", torch.float32, kept=kept))
    assert {few[role].pop("kept") for role in few} == {kept}
    assert {plain[role].pop("kept") for role in plain} == {"none"}
    assert few == plain


def test_a_base_that_is_kept_in_something_else_is_told() -> None:
    plain, few = described(), described(tiny_base("llama", torch.float32, kept="nf4"))
    message = r"on a base that is kept in none, this run's student.adapter_base is nf4: set student.adapter_base = none"
    with pytest.raises(UserError, match=message):
        bases.check(plain, few, NAMES)
    # Of before there was a choice.
    for described_as in plain.values():
        del described_as["kept"]
    with pytest.raises(UserError, match=message):
        bases.check(plain, few, NAMES)
    bases.check(plain, described(), NAMES)


def test_another_base_in_few_bits_is_told_by_what_few_bits_do_not_see() -> None:
    def kept(change: float):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 5] += change
        quantise_base(model, StudentSettings(adapter="lora", adapter_base="nf4"), torch.device("cpu"), "student")
        return SharedBase(model, "tiny")

    with pytest.raises(UserError, match="were trained on the base"):
        bases.check(described(kept(0.0)), described(kept(1e-6)), NAMES)


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
