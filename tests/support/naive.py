"""The specification, transcribed literally: one sequence at a time, full logits, all repetitions."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(model, prompt_ids, response_ids, temperature: float) -> Tensor:
    """log softmax(logits / T) of every response token, [R] in the model's dtype."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = model(input_ids=ids).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    return torch.stack([logprobs[len(prompt_ids) - 1 + t, token] for t, token in enumerate(response_ids)])


def advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std(unbiased=True) + 1e-6)


def grpo_loss(
    groups: list[tuple[list[Tensor], list[Tensor] | None, list[Tensor] | None, Tensor]],
    *,
    clip: float,
    beta: float,
    samplers: list[list[Tensor]] | None = None,
    cap: float | None = None,
) -> Tensor:
    """groups: (logp per sample, old logp per sample or None, ref logp per sample or None, rewards). samplers: what the
    sampler said, by group and sample, for truncated importance weights with a cap."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for g, (logps, olds, refs, rewards) in enumerate(groups):
        for i, logp in enumerate(logps):
            advantage = advantages(rewards)[i]
            for t in range(len(logp)):
                old = logp[t].detach() if olds is None else olds[i][t]
                rho = torch.exp(logp[t] - old)
                clipped = torch.clamp(rho, 1 - clip, 1 + clip)
                loss = -torch.min(rho * advantage, clipped * advantage)
                if samplers is not None:
                    loss = torch.exp(old.detach() - samplers[g][i][t]).clamp(max=cap) * loss
                if refs is not None:
                    difference = refs[i][t] - logp[t]
                    loss = loss + beta * (torch.exp(difference) - difference - 1)
                total, count = total + loss, count + 1
    return total / count


def score(model, prompt_ids, response_ids) -> Tensor:
    """D(x, y) = w . h_last + b, of one sequence alone."""
    hidden = model.base_model(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).last_hidden_state
    return hidden[0, -1] @ model.score.weight[0]


def bt_loss(model, groups: list[tuple[tuple, tuple, list[tuple]]]) -> Tensor:
    """groups: (prompt ids, teacher ids, sample ids). The teacher is scored again for every one of its N pairs."""
    losses = []
    for prompt, teacher, samples in groups:
        for sample in samples:
            margin = score(model, prompt, teacher) - score(model, prompt, sample)
            losses.append(torch.log1p(torch.exp(-margin)))
    return torch.stack(losses).mean()


def dpo_loss(model, reference, groups: list[tuple[tuple, tuple, list[tuple]]], beta: float) -> Tensor:
    """groups: (prompt ids, teacher ids, sample ids). The teacher is read again for every one of its N pairs."""
    losses = []
    for prompt, teacher, samples in groups:
        for sample in samples:
            chosen = token_logprobs(model, prompt, teacher, 1.0).sum()
            rejected = token_logprobs(model, prompt, sample, 1.0).sum()
            with torch.no_grad():
                ref_chosen = token_logprobs(reference, prompt, teacher, 1.0).sum()
                ref_rejected = token_logprobs(reference, prompt, sample, 1.0).sum()
            logits = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
            losses.append(-torch.log(torch.sigmoid(logits)))
    return torch.stack(losses).mean()
