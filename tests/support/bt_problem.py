"""What every Bradley-Terry kernel is held to: a problem, and its forward and backward pass in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of one rounding from float32, in which all sums run.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

Arguments = dict[str, Any]


def problem(
    sizes: list[int], taught: list[bool], width: int, dtype: torch.dtype, tokens: int = 50, seed: int = 0
) -> Arguments:
    """Arguments of a forward pass over groups of `sizes` sequences; rows of hidden repeat by chance."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return dict(
        hidden=torch.randn(tokens, width, generator=generator).to(dtype),
        last_index=torch.randint(0, tokens, (int(offsets[-1]),), generator=generator),
        weight=torch.randn(width, generator=generator) / width**0.5,
        bias=torch.randn((), generator=generator),
        group_offsets=offsets,
        has_teacher=torch.tensor(taught, dtype=torch.bool),
    )


def ragged(width: int, dtype: torch.dtype) -> Arguments:
    """Empty groups, a teacher alone, groups without a teacher, one of more sequences than a tile or a block takes."""
    return problem([3, 0, 1, 37, 2, 1, 0], [True, True, True, True, False, False, False], width, dtype)


LAYOUTS = ["rows with gaps", "misaligned", "every second column", "transposed"]


def strided(layout: str, dtype: torch.dtype) -> Arguments:
    """No argument is contiguous; NaN lies around the rows of hidden and between the elements of weight."""
    arguments = problem([5, 2], [True, False], 48, dtype)
    hidden = arguments["hidden"]
    tokens, width = hidden.shape
    view = {
        "rows with gaps": torch.full((tokens, width + 16), torch.nan, dtype=dtype)[:, 8:-8],
        "misaligned": torch.full((tokens * width + 1,), torch.nan, dtype=dtype)[1:].view(tokens, width),
        "every second column": torch.full((tokens, 2 * width), torch.nan, dtype=dtype)[:, ::2],
        "transposed": torch.full((width, tokens), torch.nan, dtype=dtype).t(),
    }[layout]
    view.copy_(hidden)
    weight = torch.full((3 * width,), torch.nan)[::3]
    weight.copy_(arguments["weight"])
    last_index = torch.stack([arguments["last_index"]] * 2, 1)[:, 0]
    return {**arguments, "hidden": view, "weight": weight, "last_index": last_index}


def equal_rows(dtype: torch.dtype) -> Arguments:
    """A group of 40 sequences whose rows are all the same."""
    arguments = problem([40], [True], 1500, dtype, tokens=40)
    arguments["hidden"][:] = arguments["hidden"][7]
    return arguments


def large_margins() -> Arguments:
    """Scores are exact; margins reach +-1e4, and losses go down to exp(-60)."""
    margins = torch.tensor([-1e4, -100.0, -20.0, 0.0, 17.0, 20.0, 60.0, 1e4])
    return dict(
        hidden=torch.cat([torch.zeros(1), -margins])[:, None],
        last_index=torch.arange(9),
        weight=torch.ones(1),
        bias=None,
        group_offsets=torch.tensor([0, 9]),
        has_teacher=torch.tensor([True]),
    )


def exact_forward(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    has_teacher: Tensor,
) -> list[Tensor]:
    """scores, pair_loss, margin, slope; and the sum of pair_loss, which not every kernel gives."""
    scores = (hidden[last_index].double() @ weight.double()) + (0 if bias is None else bias.double())
    pair_loss, margin, slope = (torch.zeros_like(scores) for _ in range(3))
    for taught, (start, end) in zip(has_teacher.tolist(), itertools.pairwise(group_offsets.tolist()), strict=True):
        if not taught or start == end:
            continue
        margin[start + 1 : end] = scores[start] - scores[start + 1 : end]
        pair_loss[start + 1 : end] = torch.nn.functional.softplus(-margin[start + 1 : end])
        slope[start + 1 : end] = torch.sigmoid(-margin[start + 1 : end])
        slope[start] = -slope[start + 1 : end].sum()
    return [scores, pair_loss, margin, slope, pair_loss.sum()]


def grad_scores(arguments: Arguments) -> Tensor:
    return torch.randn(len(arguments["last_index"]), generator=torch.Generator().manual_seed(1))


def operands(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, last_index, weight: what the backward pass takes beside the gradient."""
    return arguments["hidden"], arguments["last_index"], arguments["weight"]


def check(forward: Callable[..., Any], backward: Callable[..., Any], arguments: Arguments) -> None:
    """Holds both passes against float64."""
    hidden, last_index, weight = operands(arguments)
    for got, exact in zip(forward(**arguments), exact_forward(**arguments), strict=False):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5)

    grad = grad_scores(arguments)
    d_hidden, d_weight, d_bias = backward(grad, hidden, last_index, weight)
    g = grad.double()
    exact_hidden = torch.zeros(hidden.shape, dtype=torch.float64)
    exact_hidden.index_add_(0, last_index, g[:, None] * weight.double())
    eps = EPS[hidden.dtype]
    torch.testing.assert_close(d_hidden.double(), exact_hidden, rtol=eps, atol=eps)
    assert (d_hidden[exact_hidden.abs().sum(1) == 0] == 0).all()
    exact_weight = g @ hidden[last_index].double()
    tolerance = 1e-5 if weight.dtype == torch.float32 else EPS[weight.dtype]
    torch.testing.assert_close(d_weight.double(), exact_weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d_bias.double(), g.sum(), rtol=1e-5, atol=1e-5)
    assert (d_hidden.dtype, d_weight.dtype, d_bias.shape) == (hidden.dtype, weight.dtype, ())


def check_equal_rows(forward: Callable[..., Any], arguments: Arguments) -> None:
    """Equal rows score equally, to the bit."""
    scores, _, margin, *_ = forward(**arguments)
    assert scores.unique().numel() == 1
    assert (margin == 0).all()


def check_large_margins(forward: Callable[..., Any], arguments: Arguments) -> None:
    """No overflow, and no loss of a small pair loss to the 1 beside it."""
    for got, exact in zip(forward(**arguments), exact_forward(**arguments), strict=False):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-37)


def check_untouched_rows(backward: Callable[..., Any], dtype: torch.dtype) -> None:
    """Rows in which no sequence ends are zero, whatever the head holds; the last ones are no whole block of rows."""
    hidden, last_index, weight = operands(problem([2], [True], 17, dtype, tokens=51))
    last_index[0], last_index[1] = 20, 1
    weight[3], weight[5] = torch.inf, torch.nan
    d_hidden, _, _ = backward(torch.ones(2), hidden, last_index, weight)
    untouched = torch.ones(51, dtype=torch.bool).index_fill_(0, last_index, False)
    assert (d_hidden[untouched] == 0).all()
    assert not d_hidden[last_index, 3].isfinite().any()
