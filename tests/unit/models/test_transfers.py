"""What goes between host and device in a pass: one copy a micro-batch, and no read of a value.

The models lie on the meta device here, which has shapes and no values: whatever would wait for a value on a GPU raises,
and what is copied there is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.data.groups import Cost, GroupTokens, packed
from gadcore.kernels import layout
from gadcore.models import learner
from gadcore.models.learner import Learner
from tests.support.builders import discriminator, groups, student

# Small enough that the batch of these tests is cut into many micro-batches.
BUDGET = 60
COST = Cost(per_token=100, per_pair=1)


class Arrivals(TorchDispatchMode):
    """count: tensors that came to the meta device from elsewhere, those that torch.tensor() made there included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._made = _Made(self)

    def __enter__(self) -> Arrivals:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        came = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if came and result.is_meta:
            self.count += any(isinstance(arg, Tensor) and not arg.is_meta for arg in args)
        return result


class _Made(TorchFunctionMode):
    """What torch.tensor() makes on a device is not dispatched as a copy."""

    def __init__(self, seen: Arrivals) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.count += func in (torch.tensor, torch.as_tensor) and result.is_meta
        return result


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what only a CPU's backbone does, and with what torch lacks of its own on meta tensors."""
    monkeypatch.setattr(learner, "fuse_backbone", lambda model: 0)
    monkeypatch.setattr(learner, "embed_in_place", lambda model: False)
    library = torch.library.Library("aten", "IMPL", "Meta")

    def segment_reduce(data: Tensor, reduce: str, *, offsets: Tensor, axis: int = 0, **kwargs: Any) -> Tensor:
        return data.new_empty(len(offsets) - 1, *data.shape[1:])

    library.impl("segment_reduce", segment_reduce)
    yield
    library._destroy()


def on_meta(made: Learner) -> Learner:
    made.model.to("meta")
    assert made.model.device.type == "meta"
    return made


def cuts(made: Learner, tokens: list[GroupTokens], *, teacher: bool) -> int:
    return len(list(packed(tokens, BUDGET, made.cost, teacher=teacher)))


def test_the_meta_device_counts_what_comes() -> None:
    with Arrivals() as seen:
        torch.tensor([1, 2], device="meta")
        torch.zeros(3).to("meta")
        torch.empty(2, device="meta").add_(1)
    assert seen.count == 2


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_student_gets_one_copy_a_micro_batch(cap: float | None) -> None:
    ours = on_meta(student(torch.float32, micro_batch_tokens=BUDGET, importance_cap=cap))
    ours.freeze_reference()
    batch = groups(6, 4)
    tokens = [GroupTokens(g.prompt.token_ids, tuple(s.token_ids for s in g.samples)) for g in batch]
    rewards = torch.zeros(24, device="meta")
    with Arrivals() as seen:
        ours.grpo_backward(batch, rewards)
    micro_batches = cuts(ours, tokens, teacher=False)
    # For the reference policy and for the student; and one for the layout of which the advantages are made.
    assert micro_batches > 10 and seen.count == 2 * micro_batches + 1


def test_cross_entropy_gets_one_copy_a_micro_batch() -> None:
    ours, batch = on_meta(student(torch.float32, micro_batch_tokens=BUDGET)), groups(6, 4)
    tokens = [GroupTokens(g.prompt.token_ids, (g.teacher.token_ids,)) for g in batch]
    with Arrivals() as seen:
        ours.seqkd_backward(batch)
    assert seen.count == cuts(ours, tokens, teacher=False) > 1


def test_the_discriminator_gets_one_copy_a_micro_batch(tmp_path) -> None:
    d, batch = on_meta(discriminator(tmp_path, torch.float32, micro_batch_tokens=BUDGET)), groups(6, 4)
    tokens = d.tokens(batch)
    with Arrivals() as seen:
        d.score(batch, backward=True)
    micro_batches = cuts(d, tokens, teacher=True)
    # And one for the places of the rewards among the scores.
    assert micro_batches > 10 and seen.count == micro_batches + 1


def test_a_copy_arrives_as_it_was() -> None:
    """Through the buffer that everything is copied in, which stays on the CPU here."""
    tokens = [GroupTokens((5, 6), ((7,), (8, 9))), GroupTokens((1,), ((2, 3), (4,)))]
    logprobs = [[-0.5], [-1.0, -2.0], [-3.0, -4.0], [-0.1]]
    (direct,) = packed(tokens, 100, COST, teacher=False, logprobs=logprobs)
    there = layout._sent(direct, torch.clone, pinned=False)
    expected, found = list(layout._tensors(direct)), list(layout._tensors(there))
    assert len(found) == len(expected) > 10
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({a.untyped_storage().data_ptr() for a in found}) == 1
    assert all(a.data_ptr() % 16 == 0 for a in found if a.numel())
    assert there.tokens.lengths == direct.tokens.lengths and there.sequences.tokens == direct.sequences.tokens
