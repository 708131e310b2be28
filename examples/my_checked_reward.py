"""Rewards beside D's score: python -m gadcore.run --algorithm.reward examples.my_checked_reward:masked

Each gets one group (gadcore.train.reward.RewardInputs). D is trained on its own loss all the same.
"""

import re

WEIGHT = 2.0


def masked(inputs):
    """A format mask: a sample whose list is not numbered 1) 2) 3) gets less than every sample of its prompt."""
    least = min(inputs.scores) - 1
    return [score if numbered(text) else least for text, score in zip(inputs.samples, inputs.scores, strict=True)]


def numbered(text):
    found = [int(number) for number in re.findall(r"\b(\d+)\) ", text)]
    return found == list(range(1, len(found) + 1))


def mixed(inputs):
    """D's score and a checkable reward: WEIGHT more for a sample whose last number is the teacher's last number."""
    right = last_number(inputs.teacher)
    if right is None:
        return inputs.scores
    return [
        score + WEIGHT * (last_number(text) == right) for text, score in zip(inputs.samples, inputs.scores, strict=True)
    ]


def last_number(text):
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None
