"""Inputs of a language-model head with the GRPO loss on top, and what has to come out, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gadcore.kernels.grpo_ratio_loss import group_advantages
from gadcore.kernels.layout import GroupLayout

# Tokens whose fp64 logits are held at a time.
REFERENCE_CHUNK = 256


@dataclass(frozen=True)
class Expected:
    """An output in fp64, and the size that its error is relative to (its own L2 norm where None)."""

    value: Tensor
    scale: float | None = None

    def error(self, got: Tensor) -> float:
        difference = got.detach().double() - self.value
        scale = self.value.norm().item() if self.scale is None else self.scale
        return difference.norm().item() / max(scale, torch.finfo(torch.float64).tiny)


@dataclass
class HeadProblem:
    """T tokens of S responses of one length, N responses a group, and a head of V rows.

    hidden: [T, H] and weight: [V, H], leaves that want gradients; targets: [T]; rewards: [S]; ref_logprob: [T], near
    the policy's own. Logits have a standard deviation of about 2. All tokens count, so that every side has equal
    tokens whatever it does with masked ones.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rewards: Tensor
    ref_logprob: Tensor
    groups: GroupLayout
    temperature: float = 0.8
    clip: float = 0.2
    # Large enough that an error of the KL term would fail the gate.
    kl_coef: float = 0.05

    @property
    def tokens(self) -> int:
        return len(self.targets)

    @cached_property
    def advantages(self) -> Tensor:
        """[S] fp32."""
        return group_advantages(self.rewards, self.groups)

    @cached_property
    def token_advantages(self) -> Tensor:
        """[T] fp32. Also the upstream gradient where a log-probability alone is differentiated."""
        return self.advantages[self.groups.sequence_of]

    @property
    def shape(self) -> dict[str, int]:
        vocabulary, width = self.weight.shape
        return {"T": self.tokens, "H": width, "V": vocabulary}

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def head_problem(
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    samples: int = 8,
    length: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> HeadProblem:
    """The same inputs on every call with the same arguments. `tokens` must be a multiple of samples * length."""
    sequences, rest = divmod(tokens, length)
    if rest or sequences % samples:
        raise ValueError(f"{tokens} tokens are no whole number of groups of {samples} responses of {length} tokens")
    source = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=device)

    problem = HeadProblem(
        hidden=normal(tokens, width).to(dtype).requires_grad_(),
        weight=normal(vocabulary, width).mul_(2 / width**0.5).to(dtype).requires_grad_(),
        targets=torch.randint(vocabulary, (tokens,), generator=source, device=device),
        rewards=normal(sequences),
        ref_logprob=torch.empty(0),
        groups=GroupLayout.of(
            [samples] * (sequences // samples), teacher=False, lengths=[length] * sequences, device=device
        ),
    )
    with torch.no_grad():
        own = [
            torch.nn.functional.linear(h, problem.weight).float().div_(problem.temperature).log_softmax(-1).gather(1, y)
            for h, y in zip(problem.hidden.split(256), problem.targets[:, None].split(256), strict=True)
        ]
    problem.ref_logprob = torch.cat(own)[:, 0] + 0.3 * normal(tokens)
    return problem


def grpo_expected(problem: HeadProblem) -> dict[str, Expected]:
    """Loss and gradients of the GRPO loss with one optimizer step a batch (ratio 1), denominator T."""
    advantage, ref = problem.token_advantages.double(), problem.ref_logprob.double()

    def slope(logprob: Tensor, part: slice) -> Tensor:
        return (-advantage[part] + problem.kl_coef * (1 - (ref[part] - logprob).exp())) / problem.tokens

    logprob, d_hidden, d_weight = _gradients(problem, slope)
    log_ratio = ref - logprob
    per_token = (-advantage + problem.kl_coef * (log_ratio.exp() - log_ratio - 1)) / problem.tokens
    return {
        # Advantages cancel over a group: an error relative to what is left of the sum would say nothing.
        "loss": Expected(per_token.sum(), scale=per_token.abs().sum().item()),
        "d_hidden": Expected(d_hidden),
        "d_weight": Expected(d_weight),
    }


def logprob_expected(problem: HeadProblem, *, gradients: bool) -> dict[str, Expected]:
    """Log-probabilities, and their gradients under the upstream gradient `token_advantages`."""
    upstream = problem.token_advantages.double()
    logprob, d_hidden, d_weight = _gradients(problem, (lambda _, part: upstream[part]) if gradients else None)
    expected = {"logprob": Expected(logprob)}
    return expected | ({"d_hidden": Expected(d_hidden), "d_weight": Expected(d_weight)} if gradients else {})


@torch.no_grad()
def _gradients(problem: HeadProblem, slope: Callable[[Tensor, slice], Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = problem.hidden.double(), problem.weight.double()
    logprob = hidden.new_empty(problem.tokens)
    d_hidden = torch.zeros_like(hidden)
    d_weight = torch.zeros_like(weight) if slope else weight
    for start in range(0, problem.tokens, REFERENCE_CHUNK):
        part = slice(start, min(start + REFERENCE_CHUNK, problem.tokens))
        targets = problem.targets[part, None]
        logs = (hidden[part] @ weight.T).div_(problem.temperature).log_softmax(-1)
        logprob[part] = logs.gather(1, targets)[:, 0]
        if slope is None:
            continue
        coefficient = slope(logprob[part], part)[:, None] / problem.temperature
        d_logits = logs.exp_().mul_(-coefficient).scatter_add_(1, targets, coefficient)
        d_hidden[part] = d_logits @ weight
        d_weight.addmm_(d_logits.T, hidden[part])
    return logprob, d_hidden, d_weight
