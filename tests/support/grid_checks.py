"""What every implementation of every op is checked for, case by case; see kernel_grid.py. GRIDS is the list of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gadcore.kernels.bt_score import bt_score
from gadcore.kernels.grpo_ratio_loss import GRPOLoss, group_advantages, grpo_ratio_loss
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.kernels.linear_logprob import KEEP_BYTES, linear_logprob
from gadcore.kernels.ops import OPS
from gadcore.kernels.rms_norm import rms_norm
from gadcore.kernels.rotary import rotary
from gadcore.kernels.take_rows import take_rows
from tests.support.kernel_grid import (
    F64,
    GROUP_CASES,
    GRPO_CASES,
    HEAD_CASES,
    RATIO_CASES,
    RATIO_TOKENS,
    RECORD,
    WIDTHS,
    GroupCase,
    HeadCase,
    RatioCase,
    around,
    gradients,
    grpo64,
    leaves64,
    logprob64,
    pairs,
    split,
    weighted,
)

CLIP = dict(clip_low=0.1, clip_high=0.3)


def to(device: str, tensor: Tensor | None) -> Any:
    """The tensor on the device; gradients come back to where it was."""
    return None if tensor is None else tensor.to(device)


def check_linear_logprob(
    case: HeadCase, impl: Any, dtype: torch.dtype, device: str = "cpu", *, keep_bytes: int = KEEP_BYTES
) -> None:
    hidden, weight, bias, targets = case.inputs(dtype)
    leaves = leaves64(hidden, weight, bias)
    truth, true_entropy = logprob64(*leaves, targets, case.temperature)
    of = weighted(truth)
    head = [to(device, tensor) for tensor in (hidden, weight, targets)]
    options: Any = dict(bias=to(device, bias), temperature=case.temperature, keep_bytes=keep_bytes, impl=impl)
    logprob, entropy = linear_logprob(*head, return_entropy=True, **options)
    plain = linear_logprob(*head, **options)
    assert not entropy.requires_grad and torch.equal(plain, logprob)
    RECORD.check(
        "linear_logprob",
        impl,
        dtype,
        pairs((logprob, entropy), (truth.detach(), true_entropy.detach())),
        pairs(gradients(of(logprob), hidden, weight, bias), gradients(of(truth), *leaves)),
    )


def check_linear_grpo_loss(
    case: HeadCase, ratio: RatioCase, impl: Any, dtype: torch.dtype, device: str = "cpu"
) -> None:
    hidden, weight, bias, targets = case.inputs(dtype)
    generator = torch.Generator().manual_seed(case.tokens)
    groups = GroupCase((3, 1, 4), (False, False, False))
    lengths = split(case.tokens, 8, generator)
    layout = groups.layout(lengths)
    rewards = torch.randn(8, generator=generator, dtype=torch.float32)
    leaves = leaves64(hidden, weight, bias)
    truth, true_entropy = logprob64(*leaves, targets, case.temperature)
    old = around(truth, dtype, generator) if ratio.old else None
    ref = around(truth, dtype, generator) if ratio.ref else None
    per_token = group_advantages(rewards, layout).to(F64)[layout.sequence_of]
    counted = targets != -100
    total, kl, clipped, ratio_max = grpo64(truth, per_token, old, ref, counted, kl_coef=ratio.kl_coef, **CLIP)
    denominator = case.tokens + 3
    result = linear_grpo_loss(
        to(device, hidden),
        to(device, weight),
        to(device, targets),
        groups.layout(lengths, device),
        rewards=to(device, rewards),
        ref_logprob=to(device, ref),
        old_logprob=to(device, old),
        bias=to(device, bias),
        temperature=case.temperature,
        kl_coef=ratio.kl_coef,
        denominator=denominator,
        return_entropy=True,
        impl=impl,
        **CLIP,
    )
    metrics = result.metrics
    assert metrics.clipped_sum.item() == clipped.item() and metrics.tokens.item() == counted.sum().item()
    count = max(1, int(counted.sum()))
    RECORD.check(
        "linear_grpo_loss",
        impl,
        dtype,
        pairs(
            (metrics.logprob, metrics.kl_sum / count, metrics.ratio_max, metrics.entropy_sum / count),
            (truth.detach(), kl / count, ratio_max, true_entropy.sum().detach() / count),
        ),
        # An upstream gradient other than 1 must scale.
        pairs(gradients(result.loss * 2.5, hidden, weight, bias), gradients(total * 2.5 / denominator, *leaves)),
    )
    # The loss is a difference of large sums: its error is measured in the tokens' magnitude.
    scale = per_token.abs().max().item() + 1
    assert abs(result.loss.item() - total.item() / denominator) <= (1e-12 if dtype == F64 else 1e-5) * scale * 10


def check_grpo_ratio_loss(tokens: int, ratio: RatioCase, impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(tokens)
    logprob = (-torch.rand(tokens, generator=generator, dtype=F64) * 5).to(dtype).requires_grad_()
    advantages = torch.randn(tokens, generator=generator, dtype=F64).to(dtype)
    (leaf,) = leaves64(logprob)
    old = around(leaf, dtype, generator) if ratio.old else None
    ref = around(leaf, dtype, generator) if ratio.ref else None
    every = torch.ones(tokens, dtype=torch.bool)
    total, kl, clipped, ratio_max = grpo64(leaf, advantages.to(F64), old, ref, every, kl_coef=ratio.kl_coef, **CLIP)
    result = grpo_ratio_loss(
        to(device, logprob),
        to(device, advantages),
        ref_logprob=to(device, ref),
        old_logprob=to(device, old),
        kl_coef=ratio.kl_coef,
        denominator=11,
        impl=impl,
        **CLIP,
    )
    assert isinstance(result, GRPOLoss) and result.metrics.clipped_sum.item() == clipped.item()
    RECORD.check(
        "grpo_ratio_loss",
        impl,
        dtype,
        pairs((result.metrics.kl_sum / tokens, result.metrics.ratio_max), (kl / tokens, ratio_max)),
        pairs(gradients(result.loss * 2.5, logprob), gradients(total * 2.5 / 11, leaf)),
    )
    assert abs(result.loss.item() - total.item() / 11) <= (1e-12 if dtype == F64 else 1e-6) * tokens


def check_bt_score(case: GroupCase, width: int, impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    layout, generator = case.layout(), torch.Generator().manual_seed(width)
    sequences = layout.sequences
    rows = 2 * sequences + 1
    hidden = torch.randn(rows, width + 3, generator=generator, dtype=F64).to(dtype)[:, :width].detach().requires_grad_()
    # Two sequences may end in one row: a response that is empty ends where its prompt does.
    last_index = torch.randint(rows, (sequences,), generator=generator)
    weight = (torch.randn(width, generator=generator, dtype=F64) / width**0.5).to(dtype).requires_grad_()
    bias = torch.tensor(0.7, dtype=dtype).requires_grad_()
    leaves = leaves64(hidden, weight, bias)

    scores = leaves[0][last_index] @ leaves[1] + leaves[2]
    margins, losses = [], []
    for start, end, has_teacher in zip(
        layout.group_offsets[:-1].tolist(), layout.group_offsets[1:].tolist(), case.teachers, strict=True
    ):
        for i in range(start, end):
            paired = has_teacher and i > start
            margins.append(scores[start] - scores[i] if paired else torch.zeros((), dtype=F64))
            losses.append(torch.log1p(torch.exp(-margins[-1])) if paired else torch.zeros((), dtype=F64))
    denominator = max(1, sum(case.samples))
    truth = torch.stack(losses).sum() / denominator
    of = weighted(scores)

    operands = [to(device, tensor) for tensor in (hidden, last_index, weight, bias)]
    result = bt_score(*operands, case.layout(device=device), denominator=denominator, impl=impl)
    margin = torch.stack(margins).detach()
    # Scores have a gradient of their own beside the loss's, as a reward model's owner may want.
    actual = gradients(result.loss + of(result.scores), hidden, weight, bias)
    RECORD.check(
        "bt_score",
        impl,
        dtype,
        pairs((result.scores, result.margin, result.loss), (scores.detach(), margin, truth.detach())),
        pairs(actual, gradients(truth + of(scores), *leaves)),
    )
    correct = (result.margin > 0) + 0.5 * (result.margin == 0)
    assert torch.equal(result.accuracy, correct.where(result.paired, 0.0).to(result.accuracy.dtype))


def check_equal_rows(impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(2)
    for case in GROUP_CASES:
        sequences = case.layout().sequences
        row = torch.randn(1, 577, generator=generator, dtype=F64).to(dtype)
        weight = torch.randn(577, generator=generator, dtype=F64).to(dtype)
        rows, last_index = to(device, row.repeat(sequences, 1)), torch.arange(sequences, device=device)
        layout = case.layout(device=device)
        result = bt_score(rows, last_index, to(device, weight), None, layout, denominator=1, impl=impl)
        assert (result.scores == result.scores[0]).all() and (result.accuracy == 0.5 * result.paired).all()


def check_tied_weights(impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(61, 24, generator=generator, dtype=F64).to(dtype).requires_grad_()
    tokens, targets = (torch.randint(61, (19,), generator=generator) for _ in range(2))
    (leaf,) = leaves64(weight)
    groups = GroupCase((2,), (False,)).layout([12, 7])
    advantages = torch.tensor([1.0, -0.5])

    def loss(w: Tensor) -> Tensor:
        hidden, y = w[tokens.to(device)], targets.to(device)
        result = linear_grpo_loss(
            hidden,
            w,
            y,
            GroupCase((2,), (False,)).layout([12, 7], device),
            advantages=advantages.to(device),
            ref_logprob=None,
            kl_coef=0.0,
            denominator=19,
            impl=impl,
            **CLIP,
        )
        return result.loss + linear_logprob(hidden, w, y, impl=impl).mean()

    truth, _ = logprob64(leaf[tokens], leaf, None, targets, 1.0)
    per_token = advantages.to(F64)[groups.sequence_of]
    total, *_ = grpo64(truth, per_token, None, None, targets != -100, kl_coef=0.0, **CLIP)
    (actual,) = gradients(loss(to(device, weight)), weight)
    (expected,) = gradients(total / 19 + truth.mean(), leaf)
    RECORD.check("tied weights", impl, dtype, [], [(actual, expected)])


def check_rotary(shape: tuple[int, int, int], impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    T, _, D = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_()
    # Of the two halves of an angle nothing is taken to be equal.
    cos, sin = torch.randn(2, T, D, generator=generator, dtype=F64).to(dtype)
    (leaf,) = leaves64(x)
    assert leaf is not None
    low, high = leaf.chunk(2, -1)
    truth = leaf * cos.to(F64)[:, None] + torch.cat((-high, low), -1) * sin.to(F64)[:, None]
    of = weighted(truth)
    y = rotary(to(device, x), to(device, cos), to(device, sin), impl=impl)
    # The result has the inputs' dtype, and so the tolerance of gradients.
    d_x = pairs(gradients(of(y.cpu()), x), gradients(of(truth), leaf))
    RECORD.check("rotary", impl, dtype, [], [(y, truth.detach()), *d_x])


def check_rms_norm(shape: tuple[int, int], shift: float, impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x, weight = (
        (3 * torch.randn(s, generator=generator, dtype=F64)).to(dtype).requires_grad_() for s in (shape, shape[1:])
    )
    wide, scale = leaves64(x, weight)
    assert wide is not None and scale is not None
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * (scale + shift)
    of = weighted(truth)
    y = rms_norm(to(device, x), to(device, weight), eps=1e-2, shift=shift, impl=impl)
    d = pairs(gradients(of(y.cpu()), x, weight), gradients(of(truth), wide, scale))
    RECORD.check("rms_norm", impl, dtype, [], [(y, truth.detach()), *d])


def check_take_rows(rows: int, taken: int, width: int, impl: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(rows + taken)
    x = torch.randn(rows, width, generator=generator, dtype=F64).to(dtype).requires_grad_()
    index = torch.randint(rows, (taken,), generator=generator)
    (leaf,) = leaves64(x)
    assert leaf is not None
    truth = leaf[index]
    of = weighted(truth)
    y = take_rows(to(device, x), index.to(device), impl=impl)
    d_x = pairs(gradients(of(y.cpu()), x), gradients(of(truth), leaf))
    RECORD.check("take_rows", impl, dtype, [(y, truth.detach())], d_x)


class Grid(NamedTuple):
    """check(*case, impl, dtype, device) for every case."""

    cases: list[tuple[Any, ...]]
    check: Callable[..., None]


# By op: those that gadcore.kernels.ops promises a grid for.
GRIDS = {
    "linear_logprob": Grid([(case,) for case in HEAD_CASES], check_linear_logprob),
    "linear_grpo_loss": Grid(GRPO_CASES, check_linear_grpo_loss),
    "grpo_ratio_loss": Grid([(n, ratio) for n in RATIO_TOKENS for ratio in RATIO_CASES], check_grpo_ratio_loss),
    "rotary": Grid([(s,) for s in ((1, 1, 2), (5, 3, 64), (33, 9, 96), (130, 2, 128))], check_rotary),
    "rms_norm": Grid(
        [(shape, shift) for shape in ((1, 1), (5, 7), (130, 576), (3, 4100)) for shift in (0.0, 1.0)], check_rms_norm
    ),
    "take_rows": Grid([(1, 1, 1), (3, 70, 33), (40, 9, 1024), (64, 200, 1500)], check_take_rows),
    "bt_score": Grid([(case, width) for case in GROUP_CASES for width in WIDTHS], check_bt_score),
}


def dtypes_of(op: str, impl: str) -> list[torch.dtype]:
    """What an implementation of an op is checked in; the reference in float64 and in whatever any other takes."""
    if impl == "reference":
        return [F64, *dict.fromkeys((*OPS[op].triton, *OPS[op].cpu))]
    return list(getattr(OPS[op], impl))
