"""The grid that every implementation of every op is held to: cases, their float64 truth, a record of errors.

A case makes its inputs in a dtype; the truth is computed in float64 from the inputs as they were rounded to it. An
error is the largest absolute difference over the largest absolute value of the truth; for results, which have a
natural unit (a nat, a score, a ratio of 1), over 1 at least.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gadcore.kernels.layout import GroupLayout

F64 = torch.float64
RATIO_TOKENS = [1, 7, 256, 1031]
WIDTHS = [1, 33, 576]
# Forward results are float32 whatever comes in; gradients are rounded to the inputs' dtype, and kernels may round d
# logits to it.
FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class Record:
    """Errors by (op, impl, dtype)."""

    tests: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[tuple[str, str, str, str], float] = field(default_factory=lambda: defaultdict(float))

    def check(
        self,
        op: str,
        impl: str,
        dtype: torch.dtype,
        forward: Iterable[tuple[Tensor, Tensor]],
        gradient: Iterable[tuple],
    ) -> None:
        """Holds (actual, truth) pairs against the tolerance of the dtype and keeps the largest errors."""
        key = (op, impl, str(dtype).removeprefix("torch."))
        self.tests[key] += 1
        for kind, pairs, tolerances in (("forward", forward, FORWARD), ("gradient", gradient, GRADIENT)):
            for index, (actual, truth) in enumerate(pairs):
                assert actual.shape == truth.shape, f"{kind} {index}: {actual.shape} for {truth.shape}"
                error = relative_error(actual, truth, 1.0 if kind == "forward" else 0.0)
                self.errors[*key, kind] = max(self.errors[*key, kind], error)
                assert error <= tolerances[dtype], f"{op} {impl} {dtype}: {kind} {index} is off by {error:.2e}"

    def rows(self) -> list[dict]:
        return [
            {
                "op": op,
                "impl": impl,
                "dtype": dtype,
                "tests": tests,
                "forward_error": self.errors[op, impl, dtype, "forward"],
                "gradient_error": self.errors.get((op, impl, dtype, "gradient")),
            }
            for (op, impl, dtype), tests in sorted(self.tests.items())
        ]

    def write(self, path: Path, seconds: float) -> None:
        """Puts this process's rows into the file, in place of earlier ones of the same implementations."""
        rows = self.rows()
        ours = {row["impl"] for row in rows}
        kept = [r for r in json.loads(path.read_text()) if r["impl"] not in ours] if path.exists() else []
        path.write_text(json.dumps(kept + [row | {"run_seconds": round(seconds, 1)} for row in rows], indent=1) + "\n")


RECORD = Record()


def relative_error(actual: Tensor, truth: Tensor, at_least: float) -> float:
    if truth.numel() == 0:
        return 0.0
    difference = (actual.detach().cpu().to(F64) - truth).abs().max().item()
    assert not math.isnan(difference), "NaN in a result"
    scale = max(truth.abs().max().item(), at_least)
    return difference / scale if scale else difference


@dataclass(frozen=True)
class HeadCase:
    """Hidden states, a head and targets."""

    tokens: int
    width: int
    vocab: int
    kind: str  # plain | ignored | all ignored | strided | extreme | impossible
    bias: bool
    temperature: float

    def __str__(self) -> str:
        bias = "bias" if self.bias else "nobias"
        return f"{self.tokens}x{self.width}x{self.vocab}-{self.kind}-{bias}-{self.temperature}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """hidden, weight, bias: leaves of dtype; targets."""
        generator = torch.Generator().manual_seed(self.tokens * 1000 + self.vocab)

        def normal(*shape: int) -> Tensor:
            if self.kind == "extreme":
                # Integers: their products are exact in every dtype, and logits reach +-1e4.
                return torch.randint(-3, 4, shape, generator=generator).to(dtype)
            return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

        targets = torch.randint(self.vocab, (self.tokens,), generator=generator)
        hidden, weight = normal(self.tokens, self.width), normal(self.vocab, self.width)
        bias = normal(self.vocab) if self.bias else None
        if self.kind == "extreme":
            hidden[:, 0], weight[:, 0] = 128, torch.randint(-80, 81, (self.vocab,), generator=generator).to(dtype)
        elif self.kind == "ignored":
            targets[:: 2 if self.tokens > 2 else 1] = -100
        elif self.kind == "all ignored":
            targets[:] = -100
        elif self.kind == "strided":
            # hidden: columns of a wider tensor; weight: transposed, no row is contiguous.
            hidden = torch.cat([hidden, normal(self.tokens, 5)], 1)[:, : self.width]
            weight = weight.T.contiguous().T
        elif self.kind == "impossible":
            assert bias is not None
            bias[torch.arange(self.vocab) % 3 == 1] = -math.inf
            targets = targets - (targets % 3 == 1).long()
        leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
        return leaves[0], leaves[1], leaves[2], targets  # type: ignore[return-value]


_SIZES = [(1, 8, 5), (1, 64, 257), (5, 1, 2), (7, 33, 101), (16, 64, 512), (33, 48, 1000), (130, 24, 77), (64, 96, 333)]
HEAD_CASES = [
    HeadCase(t, h, v, kind, bias, temperature)
    for t, h, v in _SIZES
    for kind in ("plain", "ignored", "strided", "extreme")
    for bias, temperature in ((False, 1.0), (True, 0.8))
] + [HeadCase(7, 33, 101, "all ignored", True, 1.0), HeadCase(17, 24, 130, "impossible", True, 0.7)]


def leaves64(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(F64).requires_grad_() for t in tensors]


def logprob64(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, all logits at once."""
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    log_p = (z / temperature).log_softmax(-1)
    ignored = targets == -100
    picked = log_p.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


@dataclass(frozen=True)
class GroupCase:
    """Groups of samples, some with a teacher."""

    samples: tuple[int, ...]
    teachers: tuple[bool, ...]

    def __str__(self) -> str:
        return "-".join(f"{n}{'t' if t else ''}" for n, t in zip(self.samples, self.teachers, strict=True))

    def layout(self, lengths: list[int] | None = None, device: str = "cpu") -> GroupLayout:
        return GroupLayout.of(self.samples, list(self.teachers), lengths, device)


GROUP_CASES = [GroupCase((n,), (True,)) for n in range(1, 17)] + [
    GroupCase((8, 8, 8), (True, True, True)),
    GroupCase((2, 0, 3, 0, 1, 16), (True, False, False, True, True, True)),
    GroupCase((0,), (True,)),
    GroupCase((4, 1), (False, False)),
]


def split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """`parts` random lengths, some of them 0, that add up to `total`."""
    cuts = sorted(torch.randint(0, total + 1, (parts - 1,), generator=generator).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


@dataclass(frozen=True)
class RatioCase:
    """What a GRPO loss is given beside log-probs."""

    old: bool
    ref: bool
    kl_coef: float

    def __str__(self) -> str:
        return f"{'old' if self.old else 'noold'}-{'ref' if self.ref else 'noref'}-{self.kl_coef}"


RATIO_CASES = [RatioCase(old, ref, kl) for old in (False, True) for ref, kl in ((True, 0.3), (True, 0.0), (False, 0.0))]
# The difference of two log-probs near 1e4 has no more than four digits in float32: no other policies there.
GRPO_CASES = [
    (case, ratio)
    for case in HEAD_CASES
    for ratio in RATIO_CASES
    if case.tokens in (1, 7, 33, 64) and not (case.kind == "extreme" and (ratio.old or ratio.ref))
]


def around(logprob: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Log-probs of another policy: near enough that some ratios stay inside the clip range and some leave it."""
    noise = torch.randn(logprob.shape, generator=generator, dtype=F64) * 0.3
    return (logprob.detach() + noise).to(torch.promote_types(dtype, torch.float32))


def grpo64(
    logprob: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    counted: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the counted tokens: loss, k3, clipped; and the largest ratio."""
    ratio = (logprob - (logprob.detach() if old is None else old.to(F64))).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(loss)
    if ref is not None:
        k3 = (ref.to(F64) - logprob).exp() - (ref.to(F64) - logprob) - 1
    lost = (clipped * advantages < ratio * advantages).to(F64)
    total = (loss + kl_coef * k3)[counted].sum()
    zero = torch.zeros((), dtype=F64)
    return (
        total,
        k3[counted].sum().detach(),
        lost[counted].sum(),
        torch.cat([ratio[counted], zero[None]]).max().detach(),
    )


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))


def pairs(actual: Iterable[Tensor], truth: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(actual, truth, strict=True))


def weighted(values: Tensor, seed: int = 5) -> Callable[[Tensor], Tensor]:
    """A scalar of `values` with a different upstream gradient for every entry."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return lambda v: (v * weights.to(v.dtype)).sum()
