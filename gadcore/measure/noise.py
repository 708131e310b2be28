"""Reward noise: how much of a reward is the discriminator's seed.

Two new discriminators that differ in nothing but their seed are trained on the same half of the prompts and score the
samples of the other half. What the student would be paid for is what both agree on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

from gadcore.config.settings import FreshSettings
from gadcore.measure.fresh import DiscriminatorLike, GroupT, batches


def reward_noise(
    groups: Sequence[GroupT], make_discriminator: Callable[[int], DiscriminatorLike[GroupT]], settings: FreshSettings
) -> float | None:
    """Correlation of the two rewards, each less its mean over the samples of a prompt.

    groups: at least two prompts, with two samples or more each. make_discriminator: an untrained one from a seed.
    None where one of them gives all samples of a prompt the same. Raises ValueError for fewer groups.
    """
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} groups cannot be cut into two halves")
    order = np.random.default_rng(settings.seed).permutation(len(groups)).tolist()
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    rewards: list[list[float]] = []
    for seed in (settings.seed, settings.seed + 1):
        discriminator = make_discriminator(seed)
        for batch in batches(train, settings, seed):
            discriminator.score([groups[i] for i in batch], backward=True)
            discriminator.step()
        found: list[float] = []
        for start in range(0, len(test), settings.batch_size):
            scores = discriminator.score([groups[i] for i in test[start : start + settings.batch_size]], backward=False)
            found += [score - fmean(group) for group in scores.rewards for score in group]
        rewards.append(found)
        del discriminator
        gc.collect()
    if min(np.std(found) for found in rewards) < 1e-12:
        return None
    return float(np.corrcoef(rewards[0], rewards[1])[0, 1])
