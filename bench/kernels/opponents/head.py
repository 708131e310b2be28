"""The head and its loss in plain PyTorch, compiled, and by cut-cross-entropy; and the bare products as the limit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.opponents.problem import HeadProblem
from bench.runner import Side

# Tokens of a compiled chunk: long enough for full speed of the products, short enough to hold few logits.
COMPILED_CHUNK = 512


def token_losses(logprob: Tensor, advantages: Tensor, ref_logprob: Tensor, clip: float, kl_coef: float) -> Tensor:
    """[T] the GRPO loss of every token where the batch gets one optimizer step, written down as it is read."""
    ratio = (logprob - logprob.detach()).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    log_ratio = ref_logprob - logprob
    return policy + kl_coef * (log_ratio.exp() - log_ratio - 1)


def gradients(problem: HeadProblem) -> dict[str, Tensor]:
    assert problem.hidden.grad is not None and problem.weight.grad is not None
    return {"d_hidden": problem.hidden.grad, "d_weight": problem.weight.grad}


def grpo_side(name: str, problem: HeadProblem, logprob: Callable[[], Tensor], *, compiled: bool = False) -> Side:
    """The GRPO loss over log-probabilities that come with gradients from somewhere else, forward and backward."""

    def call() -> dict[str, Tensor]:
        losses = token_losses(logprob(), problem.token_advantages, problem.ref_logprob, problem.clip, problem.kl_coef)
        loss = losses.sum() / problem.tokens
        loss.backward()
        return {"loss": loss.detach(), **gradients(problem)}

    return Side(name, call, problem.clear, compiled)


def logprob_side(
    name: str, problem: HeadProblem, logprob: Callable[[], Tensor], *, backward: bool, compiled: bool = False
) -> Side:
    """Log-probabilities alone; with `backward` also their gradients under the upstream gradient token_advantages."""

    def forward_only() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logprob": logprob()}

    def both() -> dict[str, Tensor]:
        values = logprob()
        values.backward(problem.token_advantages)
        return {"logprob": values.detach(), **gradients(problem)}

    return Side(name, both, problem.clear, compiled) if backward else Side(name, forward_only, compiled=compiled)


def bare_products(problem: HeadProblem, *, backward: bool) -> Side:
    """The matrix products that no way around the head can do without, into memory that is there already.

    Forward: logits. Backward: d_hidden and d_weight, out of the logits in place of their gradient.
    """
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = (torch.empty_like(hidden), torch.empty_like(weight)) if backward else (None, None)

    def call() -> dict[str, Tensor]:
        torch.mm(hidden, weight.T, out=logits)
        if backward:
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.T, hidden, out=d_weight)
        return {}

    return Side("three bare products" if backward else "one bare product", call, limit=True)


def naive_logprob(problem: HeadProblem) -> Callable[[], Tensor]:
    """Full logits, log_softmax, gather; autograd keeps what it needs."""

    def call() -> Tensor:
        logits = F.linear(problem.hidden, problem.weight).float() / problem.temperature
        return logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]

    return call


def cut_cross_entropy_logprob(problem: HeadProblem, impl: str = "torch_compile") -> Callable[[], Tensor]:
    """Apple's cut-cross-entropy, reduction "none". It knows no temperature: hidden is divided by it beforehand.

    impl: "torch_compile", its path for CPUs, or "cce", its Triton kernels.
    """
    from cut_cross_entropy import linear_cross_entropy

    def call() -> Tensor:
        hidden = problem.hidden / problem.temperature
        # filter_eps None: by default its kernels drop small gradients.
        loss = linear_cross_entropy(
            hidden, problem.weight, problem.targets, reduction="none", impl=impl, filter_eps=None
        )
        return -loss.float()

    return call


def compiled_grpo(problem: HeadProblem, chunk: int = COMPILED_CHUNK) -> Side:
    """torch.compile of the loss of a chunk of tokens; each chunk goes forward and backward before the next."""

    def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, ref_logprob: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float() / problem.temperature
        logprob = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return token_losses(logprob, advantages, ref_logprob, problem.clip, problem.kl_coef).sum() / problem.tokens

    compiled = torch.compile(chunk_loss, fullgraph=True, dynamic=False)

    def call() -> dict[str, Tensor]:
        total = torch.zeros((), device=problem.hidden.device)
        parts = (problem.targets, problem.token_advantages, problem.ref_logprob)
        # Whole columns are split before the loop; the gradient of a slice of hidden would be as long as hidden.
        pieces = [piece.detach().requires_grad_() for piece in problem.hidden.split(chunk)]
        for hidden, *rest in zip(pieces, *(part.split(chunk) for part in parts), strict=True):
            loss = compiled(hidden, problem.weight, *rest)
            loss.backward()
            total += loss.detach()
        problem.hidden.grad = torch.cat([piece.grad for piece in pieces if piece.grad is not None])
        return {"loss": total, **gradients(problem)}

    return Side(f"torch.compile, chunks of {chunk}", call, problem.clear, compiled=True)


def compiled_logprob(problem: HeadProblem, *, backward: bool, chunk: int = COMPILED_CHUNK) -> Side:
    """torch.compile of the log-probabilities of a chunk of tokens; with `backward` chunk by chunk, as compiled_grpo."""

    def chunk_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float() / problem.temperature
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    compiled = torch.compile(chunk_logprob, fullgraph=True, dynamic=False)
    columns = (problem.targets, problem.token_advantages)

    def forward_only() -> dict[str, Tensor]:
        with torch.no_grad():
            pieces = zip(problem.hidden.split(chunk), problem.targets.split(chunk), strict=True)
            return {"logprob": torch.cat([compiled(hidden, problem.weight, y) for hidden, y in pieces])}

    def both() -> dict[str, Tensor]:
        values = []
        pieces = [piece.detach().requires_grad_() for piece in problem.hidden.split(chunk)]
        for hidden, targets, upstream in zip(pieces, *(c.split(chunk) for c in columns), strict=True):
            logprob = compiled(hidden, problem.weight, targets)
            logprob.backward(upstream)
            values.append(logprob.detach())
        problem.hidden.grad = torch.cat([piece.grad for piece in pieces if piece.grad is not None])
        return {"logprob": torch.cat(values), **gradients(problem)}

    name = f"torch.compile, chunks of {chunk}"
    return Side(name, both, problem.clear, compiled=True) if backward else Side(name, forward_only, compiled=True)
