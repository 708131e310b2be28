"""How alike the student's text and the teacher's are: longest common subsequence, n-grams, length.

Words are what the measures count: the text in Unicode form NFKC and lower case, cut into runs of letters, digits and
underscores; Chinese and Japanese characters, which are written without spaces, are each a word. Punctuation is dropped.
Every score is symmetric in [0, 1], 1 for equal word lists, except for the length ratio.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

NGRAMS = (1, 2, 3, 4)

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, as the module's docstring defines them."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: 2 LCS / (words + words); 1 for two texts without words."""
    a, b = words(candidate), words(reference)
    return _f1(LCSseq.similarity(a, b), len(a), len(b))


def ngram_f1(candidate: str, reference: str, n: int) -> float:
    """F1 of common n-grams of words, each counted at most as often as the other text has it.

    Two texts that are both too short for an n-gram score 1 if their words are equal, else 0.
    """
    if n < 1:
        raise ValueError(f"n = {n}: n-grams have at least one word")
    a, b = words(candidate), words(reference)
    if len(a) < n and len(b) < n:
        return float(a == b)
    grams_a, grams_b = ngrams(a, n), ngrams(b, n)
    return _f1((grams_a & grams_b).total(), grams_a.total(), grams_b.total())


def length_ratio(candidate: str, reference: str) -> float:
    """Candidate's words over reference's words; a reference without words counts as one word, two such texts give 1."""
    a, b = len(words(candidate)), len(words(reference))
    return a / max(b, 1) if a or b else 1.0


def ngrams(sequence: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often every n-gram of a sequence of words occurs in it."""
    return Counter(tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def _f1(common: int, a: int, b: int) -> float:
    return 2 * common / (a + b) if a or b else 1.0
