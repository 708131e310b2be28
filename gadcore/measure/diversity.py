"""How varied a model's text is: repetition inside a response, and distinct n-grams over all responses.

Words are those of gadcore.measure.likeness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from gadcore.measure.likeness import ngrams, words


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that occurred before in it: 1 - distinct / all; 0 for a text without n-grams."""
    grams = ngrams(words(text), n)
    return 1 - len(grams) / grams.total() if grams else 0.0


def distinct_values(texts: Sequence[str], n: int) -> list[float]:
    """distinct-n as a value per text: their mean is distinct-n, their spread is its jackknife's.

    distinct-n d: different n-grams over n-grams, counted over all texts together; 0 where there are none. It falls with
    the amount of text, so it compares models on the same prompts only, and longer responses lower it by this alone.

        value_i = d + (k - 1) (mean_j d_(-j) - d_(-i)),   d_(-i): distinct-n of the k texts but for the i-th

    distinct-n is no mean over texts, and drawing texts with replacement makes copies, which lower it. These values
    carry how much each text moves it, so intervals and paired differences are made of them as of any measure.
    """
    counts = [ngrams(words(text), n) for text in texts]
    total: Counter[tuple[str, ...]] = Counter(chain.from_iterable(grams.elements() for grams in counts))
    kinds, amount = len(total), total.total()
    without = []
    for grams in counts:
        own = sum(total[gram] == count for gram, count in grams.items())
        rest = amount - grams.total()
        without.append((kinds - own) / rest if rest else 0.0)
    d, mean, k = kinds / amount if amount else 0.0, sum(without) / len(without), len(texts)
    return [d + (k - 1) * (mean - value) for value in without]


def distinct_of_samples(samples: Sequence[Sequence[str]], n: int) -> list[list[float]]:
    """distinct-n as a value per sample of every prompt, of as many samples to each: counted over one sample to each
    prompt at a time.

    Over all of them together it would fall with their number alone, and could not be held against the teacher's, who
    has one response to a prompt.
    """
    rounds = [distinct_values(texts, n) for texts in zip(*samples, strict=True)]
    return [list(values) for values in zip(*rounds, strict=True)]
