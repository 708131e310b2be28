"""Plain PyTorch for the ops without a large product: Bradley-Terry scores, the ratio loss, few-row linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.opponents.head import token_losses
from bench.kernels.opponents.problem import Expected
from bench.runner import Side
from gadcore.kernels.layout import GroupLayout


@dataclass(frozen=True)
class ScoreProblem:
    """G groups of a teacher and N samples, all of one length; hidden: [T, H], weight: [H], bias: scalar, leaves."""

    hidden: Tensor
    last_index: Tensor
    weight: Tensor
    bias: Tensor
    groups: GroupLayout
    samples: int

    @property
    def pairs(self) -> int:
        return self.samples * len(self.groups.has_teacher)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    @property
    def shape(self) -> dict[str, int]:
        tokens, width = self.hidden.shape
        return {"G": len(self.groups.has_teacher), "N": self.samples, "T": tokens, "H": width}


def score_problem(
    groups: int, samples: int, length: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ScoreProblem:
    source = torch.Generator(device).manual_seed(0)
    sequences = groups * (samples + 1)
    hidden = torch.randn(sequences * length, width, generator=source, device=device).to(dtype).requires_grad_()
    weight = torch.randn(width, generator=source, device=device).mul_(width**-0.5).requires_grad_()
    last_index = torch.arange(1, sequences + 1, device=device) * length - 1
    bias = torch.full((), 0.5, device=device, requires_grad=True)
    layout = GroupLayout.of([samples] * groups, teacher=True, device=device)
    return ScoreProblem(hidden, last_index, weight, bias, layout, samples)


def naive_score(problem: ScoreProblem) -> Side:
    """Gather, matrix-vector product, pairs by indexing; autograd."""
    groups, samples = len(problem.groups.has_teacher), problem.samples

    def call() -> dict[str, Tensor]:
        scores = problem.hidden[problem.last_index].float() @ problem.weight + problem.bias
        table = scores.view(groups, samples + 1)
        loss = F.softplus(table[:, 1:] - table[:, :1]).sum() / problem.pairs
        d_hidden, d_weight, d_bias = torch.autograd.grad(loss, problem.leaves, allow_unused=True)
        return {"scores": scores.detach(), "loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    return Side("naive torch", call)


def score_expected(problem: ScoreProblem) -> dict[str, Expected]:
    hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in problem.leaves)
    scores = hidden[problem.last_index] @ weight + bias
    table = scores.view(len(problem.groups.has_teacher), problem.samples + 1)
    loss = F.softplus(table[:, 1:] - table[:, :1]).sum() / problem.pairs
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    outputs = {"scores": scores.detach(), "loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}
    return {name: Expected(value) for name, value in outputs.items()}


@dataclass(frozen=True)
class RatioProblem:
    """logprob: [T] fp32, a leaf; advantages, ref_logprob: [T] fp32."""

    logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor
    clip: float = 0.2
    kl_coef: float = 0.05


def ratio_problem(tokens: int, *, device: str = "cpu") -> RatioProblem:
    source = torch.Generator(device).manual_seed(0)
    logprob, advantages, noise = torch.randn(3, tokens, generator=source, device=device)
    logprob = logprob.abs().neg()
    return RatioProblem(logprob.clone().requires_grad_(), advantages, logprob + 0.3 * noise)


def naive_ratio(problem: RatioProblem) -> Side:
    def call() -> dict[str, Tensor]:
        losses = token_losses(problem.logprob, problem.advantages, problem.ref_logprob, problem.clip, problem.kl_coef)
        loss = losses.sum() / len(losses)
        (d_logprob,) = torch.autograd.grad(loss, problem.logprob)
        return {"loss": loss.detach(), "d_logprob": d_logprob}

    return Side("naive torch", call)


def ratio_expected(problem: RatioProblem) -> dict[str, Expected]:
    logprob = problem.logprob.detach().double().requires_grad_()
    advantages, ref = problem.advantages.double(), problem.ref_logprob.double()
    losses = token_losses(logprob, advantages, ref, problem.clip, problem.kl_coef) / len(logprob)
    (d_logprob,) = torch.autograd.grad(losses.sum(), logprob)
    scale = losses.detach().abs().sum().item()
    return {"loss": Expected(losses.detach().sum(), scale), "d_logprob": Expected(d_logprob)}


class Weights:
    """Weights of one shape that are used in turn, as a model's layers are, so that none stays in the cache."""

    def __init__(self, copies: int, rows: int, width: int) -> None:
        source = torch.Generator().manual_seed(0)
        first = torch.randn(rows, width, generator=source).mul_(width**-0.5)
        self.all = [first.clone() for _ in range(copies)]
        self.next = 0

    def take(self) -> Tensor:
        self.next = (self.next + 1) % len(self.all)
        return self.all[self.next]
