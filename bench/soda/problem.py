"""Pairs for a DPO step, and the literal loss and gradients that both sides are held to: fp64, a response at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from gadcore.data.groups import Group, Prompt, Response

BETA = 0.1
# Nats by which the reference differs from the student: margins of a run that has begun.
APART = 3.0


@dataclass(frozen=True)
class Shape:
    """Of a batch: prompts of `prompt` tokens, responses of half of `response` tokens to all of it, `samples` of them to
    a prompt beside the teacher's."""

    prompt: int
    response: int
    samples: int
    groups: int

    @classmethod
    def of(cls, name: str) -> Shape:
        """From PROMPTxRESPONSExSAMPLESxGROUPS; raises ValueError for anything else."""
        return cls(*map(int, name.split("x")))

    def batch(self, vocabulary: int, end_id: int, seed: int = 0) -> list[Group]:
        rng = random.Random(seed)

        def drawn(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(3, vocabulary) for _ in range(count))

        def response() -> Response:
            ids = (*drawn(rng.randint(self.response // 2, self.response) - 1), end_id)
            return Response("", ids, True)

        return [
            Group(Prompt(i, (), drawn(self.prompt)), response(), [response() for _ in range(self.samples)])
            for i in range(self.groups)
        ]


def tokens_of(groups: Sequence[Group]) -> int:
    """Tokens of the texts, every prompt and every response once: the work that there is, however it is computed."""
    return sum(
        len(g.prompt.token_ids) + len(g.teacher.token_ids) + sum(len(s.token_ids) for s in g.samples) for g in groups
    )


def rows_of(groups: Sequence[Group]) -> list[list[int]]:
    """Token ids of prompt and response, by group the teacher's first."""
    return [[*g.prompt.token_ids, *r.token_ids] for g in groups for r in (g.teacher, *g.samples)]


@dataclass(frozen=True)
class Literal:
    """loss, gradient (of all parameters, flat, fp64), reference: by group, as preference_backward() takes it."""

    loss: float
    gradient: Tensor
    reference: list[list[float]]


def literal(model: PreTrainedModel, groups: Sequence[Group], seed: int = 0) -> Literal:
    """model: in fp64. The reference is the model's own log-probs, moved by APART at random.

    A response's graph is freed before the next: the loss is computed without gradients first, which gives the weight of
    every response's log-prob.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        own = [[_logprob(model, g, r).item() for r in (g.teacher, *g.samples)] for g in groups]
    reference = [[v + APART * torch.randn((), generator=generator).item() for v in row] for row in own]
    held = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in own]
    pairs = sum(len(g.samples) for g in groups)
    ratios = [one - torch.tensor(row, dtype=torch.float64) for one, row in zip(held, reference, strict=True)]
    loss = torch.stack([F.softplus(-BETA * (h[0] - h[1:])).sum() for h in ratios]).sum() / pairs
    loss.backward()
    model.zero_grad(set_to_none=True)
    for group, weights in zip(groups, held, strict=True):
        for response, weight in zip((group.teacher, *group.samples), _gradient(weights), strict=True):
            (weight * _logprob(model, group, response)).backward()
    return Literal(loss.item(), gradient_of(model), reference)


def _gradient(values: Tensor) -> Iterator[float]:
    assert values.grad is not None
    yield from values.grad.tolist()


def _logprob(model: PreTrainedModel, group: Group, response: Response) -> Tensor:
    """log p(y | x), a scalar."""
    prompt, ids = len(group.prompt.token_ids), torch.tensor([[*group.prompt.token_ids, *response.token_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, prompt:, None]).sum()


def gradient_of(model: PreTrainedModel) -> Tensor:
    """[P] fp64, in the order of the names."""
    found = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return torch.cat([grad.double().flatten() for _, grad in found])
