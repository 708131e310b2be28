"""What the passes of a student find."""

from __future__ import annotations

from gadcore.models.readout import Readout

# A difference of log-probs that no rounding explains: a factor of 1.1 between sampler and trainer.
FAR = 0.1
# Of PolicyStats, what is added up over micro-batches.
SUMS = ("loss", "kl", "entropy", "clip_fraction", "logprob_diff_mean", "logprob_far_share", "sampler_kl")


class PolicyStats(Readout):
    """What a GRPO pass found: per-token means over the batch, except *_max; tokens processed.

    Of the sampler's log-probs as they came, whatever algorithm.importance_cap makes of them, with
    d = logprob - sampled logprob: logprob_diff_mean, logprob_diff_max of |d|; logprob_far_share of |d| > FAR;
    sampler_kl of k3 = exp(d) - d - 1, which estimates KL(sampler | trainer) since the sampler drew the tokens.
    capped_share: tokens whose importance weight met the cap, only where there is one.
    """

    loss: float
    kl: float
    entropy: float
    clip_fraction: float
    ratio_max: float
    logprob_diff_mean: float
    logprob_diff_max: float
    logprob_far_share: float
    sampler_kl: float


class SeqKDStats(Readout):
    """What a SeqKD pass found: cross-entropy per token, tokens processed."""

    ce: float
