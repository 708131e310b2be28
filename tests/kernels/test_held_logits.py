"""Logits that linear_logprob holds on a CPU from forward to backward: how many, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.kernels.linear_logprob import KEEP_BYTES, held_columns, linear_logprob
from tests.support.grid_checks import check_linear_logprob
from tests.support.kernel_grid import HEAD_CASES, HeadCase

pytestmark = pytest.mark.native

# More than two blocks of tokens of the C++, and a vocabulary that is no multiple of a segment.
TOKENS, HIDDEN, VOCAB = 1100, 24, 130
COLUMN = 4 * VOCAB
NONE, FEW, PART, ALL = 0, 16 * COLUMN, 700 * COLUMN, KEEP_BYTES


class Calls(TorchDispatchMode):
    """Columns that forward is told to hold, and shapes of zeros that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[int] = []
        self.zeros: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gadcore.linear_logprob.default:
            self.columns.append(args[6])
        if func in (torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default):
            self.zeros.append(tuple(args[0] if isinstance(args[0], list) else args[0].shape))
        return func(*args, **(kwargs or {}))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, all of them leaves with a gradient, and targets, of which a few are ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    # So far down that a lane of no token, whose logits are 0, would outweigh all others.
    values[2] -= 60
    leaves = [value.to(dtype).requires_grad_() for value in values]
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[::17] = -100
    return leaves[0], leaves[1], leaves[2], targets


def gradients(keep_bytes: int, slopes: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(logprob, d hidden, d weight, d bias)."""
    *leaves, targets = inputs(dtype)
    hidden, weight, bias = leaves
    logprob = linear_logprob(hidden, weight, targets, bias=bias, temperature=0.8, keep_bytes=keep_bytes, impl="cpu")
    return logprob.detach(), *torch.autograd.grad(logprob, leaves, slopes)


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_columns_fit_the_budget_and_are_no_more_than_there_are_tokens() -> None:
    for vocabulary in (1, 77, 49152, 151936):
        for tokens in (1, 16, 17, 48, 496, 1024, 5000):
            for keep in (0, 4 * vocabulary * 15, 4 * vocabulary * 16, 4 * vocabulary * 100, KEEP_BYTES):
                columns = held_columns(tokens, vocabulary, keep)
                assert 4 * vocabulary * columns <= keep and (columns == 0 or columns % 32 == 16)
                # No more than tokens filled up, and no fewer than would have fitted.
                assert columns < tokens + 32
                assert columns >= tokens or 4 * vocabulary * (columns + 32) > keep
    assert held_columns(1024, 49152, KEEP_BYTES) >= 1024


@pytest.mark.parametrize("columns", [0, 16, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_with_no_logits_some_and_nearly_all(columns: int, dtype: torch.dtype) -> None:
    """All that fit is what the grid itself is computed with."""
    for case in HEAD_CASES:
        if case.tokens > columns:
            check_linear_logprob(case, "cpu", dtype, keep_bytes=4 * case.vocab * columns)


@pytest.mark.parametrize("keep", [FEW, PART, ALL])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_gradients_are_those_of_logits_that_are_computed_again(keep: int, dtype: torch.dtype, tolerance: float) -> None:
    slopes = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
    close(gradients(keep, slopes, dtype), gradients(NONE, slopes, dtype), tolerance)


@pytest.mark.parametrize("keep", [FEW, PART, ALL])
@pytest.mark.parametrize("wanted", [lambda t: t % 3 > 0, lambda t: t >= 40, lambda t: t < 10, lambda t: t > 5000])
def test_tokens_without_a_gradient_among_those_that_are_held(keep: int, wanted: Callable[[Tensor], Tensor]) -> None:
    slopes = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
    slopes = slopes.where(wanted(torch.arange(TOKENS)), 0.0)
    found = gradients(keep, slopes)
    close(found, gradients(NONE, slopes), 1e-6)
    assert found[1][slopes == 0].eq(0).all()


def test_a_second_backward_pass_finds_the_logits_as_they_were() -> None:
    hidden, weight, bias, targets = inputs()
    loss = linear_logprob(hidden, weight, targets, bias=bias, keep_bytes=PART, impl="cpu").sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        assert torch.equal(one, other)


def held_by(tokens: int, saved: list[Tensor]) -> Tensor:
    """The log-probs' sum over the first `tokens`, whose held logits go to `saved`."""
    hidden, weight, bias, targets = inputs()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and len(tensor) == VOCAB and tensor.shape[1] != HIDDEN:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return linear_logprob(hidden[:tokens], weight, targets[:tokens], bias=bias, impl="cpu").sum()


def test_the_memory_of_one_call_is_the_next_ones_and_never_of_two_at_once() -> None:
    saved: list[Tensor] = []
    losses = [held_by(tokens, saved) for tokens in (TOKENS, 40)]
    kept = [logits.clone() for logits in saved]
    losses.append(held_by(TOKENS, saved))
    places = [logits.data_ptr() for logits in saved]
    assert len(set(places)) == 3
    assert all(torch.equal(one, other) for one, other in zip(saved, kept, strict=False))
    del losses, saved
    later: list[Tensor] = []
    loss = held_by(TOKENS - 100, later)
    assert loss.requires_grad and later[0].data_ptr() in (places[0], places[2])


def d_weight(seed: int) -> Tensor:
    hidden, weight, bias, targets = inputs()
    slopes = torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed))
    logprob = linear_logprob(hidden, weight, targets, bias=bias, keep_bytes=NONE, impl="cpu")
    return torch.autograd.grad(logprob, weight, slopes)[0]


def test_the_memory_of_a_gradient_is_the_next_ones_once_it_is_freed() -> None:
    alive = [d_weight(seed) for seed in range(4)]
    assert len({gradient.data_ptr() for gradient in alive}) == 4
    copies = [gradient.clone() for gradient in alive]
    places = {gradient.data_ptr() for gradient in alive}
    del alive
    again = d_weight(0)
    assert again.data_ptr() in places and torch.equal(again, copies[0])
    # Kept as any other gradient is: added up by a second pass, and saved.
    leaf = torch.zeros_like(again).requires_grad_()
    for gradient in (again, copies[1]):
        leaf.backward(gradient)
    assert leaf.grad is not None and torch.equal(leaf.grad, copies[0] + copies[1])


@pytest.mark.parametrize("keep", [NONE, FEW, PART, ALL])
def test_no_more_than_the_budget_is_kept_for_the_backward_pass(keep: int) -> None:
    hidden, weight, bias, targets = inputs()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_logprob(hidden, weight, targets, bias=bias, keep_bytes=keep, impl="cpu")
    held = [t for t in kept if t.dim() == 2 and len(t) == VOCAB and t is not weight]
    assert [t.shape[1] for t in held] == [held_columns(TOKENS, VOCAB, keep)]
    assert held[0].nbytes <= keep and (keep == NONE or held[0].nbytes > 0)


def test_nothing_is_held_where_no_gradient_is_wanted() -> None:
    hidden, weight, bias, targets = inputs()
    with Calls() as calls:
        with torch.no_grad():
            linear_logprob(hidden, weight, targets, bias=bias, impl="cpu")
        linear_logprob(hidden.detach(), weight.detach(), targets, impl="cpu")
        linear_logprob(hidden, weight.detach(), targets, impl="cpu")
    assert calls.columns == [0, 0, held_columns(TOKENS, VOCAB, KEEP_BYTES)]


def test_autograd_makes_no_zeros_of_the_size_of_the_logits() -> None:
    hidden, weight, bias, targets = inputs()
    loss = linear_logprob(hidden, weight, targets, bias=bias, impl="cpu").sum()
    with Calls() as calls:
        loss.backward()
    assert (VOCAB, held_columns(TOKENS, VOCAB, KEEP_BYTES)) not in calls.zeros


class Cut(torch.autograd.Function):
    """Hands no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def test_log_probs_that_get_no_gradient_give_none() -> None:
    hidden, weight, bias, targets = inputs()
    logprob = linear_logprob(hidden, weight, targets, bias=bias, impl="cpu")
    (Cut.apply(logprob).sum() + hidden.sum()).backward()
    assert hidden.grad is not None and hidden.grad.eq(1).all() and weight.grad is None


def test_a_budget_below_zero_is_an_error() -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="keep_bytes must be 0 or more, is -1"):
        linear_logprob(hidden, weight, targets, keep_bytes=-1)


def test_one_case_of_many_tokens_against_float64() -> None:
    case = HeadCase(TOKENS, HIDDEN, VOCAB, "ignored", True, 0.8)
    for keep in (NONE, FEW, PART, ALL):
        check_linear_logprob(case, "cpu", torch.float32, keep_bytes=keep)
