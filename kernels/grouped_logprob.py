"""Log-probabilities of given tokens out of hidden states, without ever holding [T, V].

z_t = (W h_t + bias) / temperature          logprob_t = z_t[y_t] - logsumexp(z_t)
entropy_t = logsumexp(z_t) - sum_v softmax(z_t)_v z_t[v]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gadcore.kernels.selected_logprob import selected_logprob

CHUNK_TOKENS = 1024


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logprob, lse = selected_logprob(logits, targets, temperature)
    if not entropy:
        return logprob, None
    with torch.no_grad():
        z = logits.to(lse.dtype) / temperature
        # xlogy-like: a logit of -inf has probability 0 and adds 0, not 0 * inf.
        return logprob, lse - ((z - lse[:, None]).exp_() * z.clamp(min=torch.finfo(z.dtype).min)).sum(-1)


def grouped_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every target token, and on request the entropy of its distribution.

    hidden: [T, H]; weight: [V, H]; targets: [T] int64 in [0, V), or -100: log-probability 0, no gradient;
    bias: [V] or None. Returns (logprob [T], entropy [T] or None), fp32 (fp64 for fp64 inputs); the entropy
    carries no gradient. Works in chunks of CHUNK_TOKENS tokens whose logits are computed again in backward.
    """
    parts = [
        checkpoint(_chunk, h, weight, bias, y, temperature, return_entropy, use_reentrant=False)
        for h, y in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    logprob = torch.cat([part[0] for part in parts])
    return logprob, torch.cat([part[1] for part in parts]) if return_entropy else None
