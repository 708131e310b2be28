"""How well the surface alone tells teacher from student: discriminators that see one plain thing of a text each.

    score(y) = w . f(y),   w by the Bradley-Terry loss on pairs, with a ridge, cross-fitted over prompts

length: words of the text. end marker: whether it ended by itself. first word, last word: that word, or mark. bag of
words: how often each frequent word occurs. What one of them reaches is a baseline to quote beside a discriminator's
accuracy: a discriminator that is no better may look at nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from gadcore.measure.intervals import Estimate, wilson
from gadcore.measure.likeness import words

FOLDS = 5
# Fewer prompts than this say nothing.
FEWEST = 8
_RIDGE = 0.05
_NEWTON_STEPS = 8
# Features of one kind at most: of the most frequent words.
_KINDS = 200
# Samples of a prompt that a baseline is fitted on: more of one prompt say little more.
_FITTED = 2
_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Side:
    """A response as text, and whether it ended by itself."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Pairs:
    """Of one held-out prompt: the teacher's response, the student's samples, and D's scores of them; () without D."""

    teacher: Side
    samples: tuple[Side, ...]
    teacher_score: float = 0.0
    scores: tuple[float, ...] = ()

    @property
    def margins(self) -> list[float]:
        """D(x, y_t) - D(x, y_s) of every pair."""
        return [self.teacher_score - score for score in self.scores]


@dataclass(frozen=True)
class Baseline:
    """accuracy: over prompts, with Wilson's interval. margins: per prompt those of its pairs."""

    accuracy: Estimate
    margins: tuple[tuple[float, ...], ...]


Features = Callable[[Side], Mapping[str, float]]


def _length(side: Side) -> Mapping[str, float]:
    size = np.log2(1 + len(words(side.text)))
    # By ranges of a factor of 1.4 too: a length between too short and too long can be the teacher's.
    return {"length": size, f"about {round(2 * size)}": 1.0}


def _piece(at: int) -> Features:
    def features(side: Side) -> Mapping[str, float]:
        pieces = _PIECE.findall(side.text.lower())
        return {pieces[at]: 1.0} if pieces else {"": 1.0}

    return features


def _bag(side: Side) -> Mapping[str, float]:
    return {word: float(np.log1p(count)) for word, count in Counter(words(side.text)).items()}


SURFACES: Mapping[str, Features] = {
    "length": _length,
    "end marker": lambda side: {"finished": float(side.finished)},
    "first word": _piece(0),
    "last word": _piece(-1),
    "bag of words": _bag,
}


def accuracy_of(margins: Sequence[Sequence[float]]) -> Estimate:
    """The share of pairs with a positive margin, a tie counting one half: mean over prompts, prompts as trials."""
    correct = [fmean(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in of_prompt) for of_prompt in margins]
    return wilson(fmean(correct), len(correct))


def baselines(pairs: Sequence[Pairs]) -> dict[str, Baseline]:
    """One for every surface; {} for fewer than FEWEST prompts."""
    if len(pairs) < FEWEST:
        return {}
    return {name: _baseline(pairs, features) for name, features in SURFACES.items()}


def _baseline(pairs: Sequence[Pairs], features: Features) -> Baseline:
    rows = [[features(side) for side in (of.teacher, *of.samples)] for of in pairs]
    order = np.random.default_rng(0).permutation(len(pairs))
    margins: dict[int, tuple[float, ...]] = {}
    for fold in range(FOLDS):
        test = set(order[fold::FOLDS].tolist())
        train = [row for i, row in enumerate(rows) if i not in test]
        # Names by the fold's own training prompts: nothing of the others is known to it.
        counts = Counter(name for row in train for side in row[: 1 + _FITTED] for name in side)
        names = {name: at for at, (name, _) in enumerate(counts.most_common(_KINDS))}
        weights = _fitted(np.concatenate([_differences(row[: 1 + _FITTED], names) for row in train]))
        margins |= {i: tuple((_differences(rows[i], names) @ weights).tolist()) for i in test}
    found = tuple(margins[i] for i in range(len(pairs)))
    return Baseline(accuracy_of(found), found)


def _differences(row: Sequence[Mapping[str, float]], names: Mapping[str, int]) -> np.ndarray:
    """[samples, features]: the teacher's minus each sample's."""
    values = np.zeros((len(row), len(names)))
    for i, side in enumerate(row):
        for name, value in side.items():
            if name in names:
                values[i, names[name]] = value
    return values[0] - values[1:]


def _fitted(differences: np.ndarray) -> np.ndarray:
    """[features]: the least of mean softplus(-w . d) + ridge |w|^2 / 2 over scaled differences, by Newton's method."""
    scale = np.sqrt((differences**2).mean(0))
    scale[scale == 0] = 1.0
    d = differences / scale
    weights = np.zeros(d.shape[1])
    for _ in range(_NEWTON_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(d @ weights, -30, 30)))
        gradient = -(wrong @ d) / len(d) + _RIDGE * weights
        hessian = (d.T * (wrong * (1 - wrong))) @ d / len(d) + _RIDGE * np.eye(len(weights))
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights / scale


def lean(pairs: Sequence[Pairs], measure: Callable[[Side], float]) -> float | None:
    """Correlation of D's score with a figure of the text, both less their mean over the samples of a prompt: what the
    student is rewarded for. None where prompts have one sample each, or where either does not vary."""
    scores, figures = [], []
    for of in pairs:
        values = [measure(side) for side in of.samples]
        scores += [score - fmean(of.scores) for score in of.scores]
        figures += [value - fmean(values) for value in values]
    if len(scores) <= len(pairs) or np.std(scores) < 1e-12 or np.std(figures) < 1e-12:
        return None
    return float(np.corrcoef(scores, figures)[0, 1])
