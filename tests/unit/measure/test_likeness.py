from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadcore.measure.likeness import length_ratio, ngram_f1, rouge_l, words

TEXT = st.lists(st.sampled_from(["a", "b", "cat", "Cat", "é", "42"]), max_size=12).map(" ".join)


def _lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[len(a)][len(b)]


def _slow_ngram_f1(a: list[str], b: list[str], n: int) -> float:
    left = [a[i : i + n] for i in range(len(a) - n + 1)]
    right = [b[i : i + n] for i in range(len(b) - n + 1)]
    if not left and not right:
        return 1.0 if a == b else 0.0
    rest, common = list(right), 0
    for gram in left:
        if gram in rest:
            rest.remove(gram)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall)


@given(TEXT, TEXT)
def test_rouge_l_is_the_textbook_f1(candidate: str, reference: str) -> None:
    a, b = candidate.lower().split(), reference.lower().split()
    common = _lcs(a, b)
    if not a and not b:
        expected = 1.0
    elif common == 0:
        expected = 0.0
    else:
        precision, recall = common / len(a), common / len(b)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(candidate, reference) == pytest.approx(expected, abs=1e-12)


@given(TEXT, TEXT, st.integers(1, 5))
def test_ngram_f1_is_the_textbook_f1(candidate: str, reference: str, n: int) -> None:
    expected = _slow_ngram_f1(candidate.lower().split(), reference.lower().split(), n)
    assert ngram_f1(candidate, reference, n) == pytest.approx(expected, abs=1e-12)


@given(st.text(), st.text())
def test_any_text_gives_symmetric_scores_between_0_and_1(a: str, b: str) -> None:
    for measure in (rouge_l, *(lambda x, y, n=n: ngram_f1(x, y, n) for n in (1, 2, 3, 4))):
        assert 0 <= measure(a, b) <= 1
        assert measure(a, b) == measure(b, a)
        assert measure(a, a) == 1


def test_counts_are_clipped() -> None:
    assert ngram_f1("the the the the", "the cat", 1) == pytest.approx(2 * 1 / (4 + 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, 3.14!", ["don", "t", "stop", "3", "14"]),
        ("e\u0301TE\u0301", ["été"]),
        ("", []),
        ("?! \n", []),
        ("ﬁne", ["fine"]),
        ("我用Python写", ["我", "用", "python", "写"]),
        ("カタ kana", ["カ", "タ", "kana"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_empty_texts() -> None:
    assert rouge_l("", "") == 1 and rouge_l("", "a") == 0 and rouge_l("a", "...") == 0
    assert ngram_f1("", "", 1) == 1 and ngram_f1("", "a", 1) == 0 and ngram_f1("a b", "a", 2) == 0
    assert ngram_f1("a", "a", 2) == 1 and ngram_f1("a", "b", 2) == 0
    assert length_ratio("", "") == 1 and length_ratio("", "a b") == 0 and length_ratio("a b", "") == 2
    assert length_ratio("a b c", "a b") == 1.5
    with pytest.raises(ValueError, match="n = 0"):
        ngram_f1("a", "a", 0)


def test_imports_no_torch() -> None:
    code = "import sys, gadcore.measure.likeness; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
