"""What D's score goes with among a prompt's samples, against the correlations written out; and when nothing is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gadcore.measure import style
from gadcore.measure.likeness import rouge_l, words
from gadcore.measure.rewarded import Association, associations

TEACHER = "an old mill and 12 stones lie there past the river"
WORDS = [*TEACHER.split(" "), "runs", "3", "x", "4", "="]
Score = Callable[[str, random.Random], float]


def evaluation(score: Score, prompts: int = 40, samples: int = 4) -> list[dict[str, Any]]:
    """Rows of random responses of 3 to 30 words, some of them cut; prompts differ in the level of their scores."""
    rng = random.Random(3)
    rows = []
    for p in range(prompts):
        level, drawn = rng.gauss(0, 10), []
        for _ in range(samples):
            text = " ".join(rng.choices(WORDS, k=rng.randint(3, 30)))
            drawn.append({"text": text, "finished": rng.random() < 0.8, "score": level + score(text, rng)})
        rows.append({"prompt": f"what about {p}", "teacher": TEACHER, "samples": drawn})
    return rows


def noise(text: str, rng: random.Random) -> float:
    return rng.gauss(0, 1)


def literal(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each sample less its prompt's mean; of style and ROUGE-L and their scores what least squares on words leaves."""
    within = style.word_range([row["teacher"] for row in rows])
    columns: dict[str, list[float]] = {"words": [], "style": [], "rouge_l": [], "score": []}
    for row in rows:
        drawn = {
            "words": [float(len(words(s["text"]))) for s in row["samples"]],
            "style": [
                style.score(style.checks(s["text"], s["finished"], row["prompt"], row["teacher"], within))
                for s in row["samples"]
            ],
            "rouge_l": [rouge_l(s["text"], row["teacher"]) for s in row["samples"]],
            "score": [s["score"] for s in row["samples"]],
        }
        for name, values in drawn.items():
            columns[name] += (np.array(values) - np.mean(values)).tolist()
    x = np.array(columns["words"])

    def left(values: list[float]) -> np.ndarray:
        fit = np.linalg.lstsq(x[:, None], np.array(values), rcond=None)[0]
        return np.array(values) - x * fit

    held = {n: np.corrcoef(left(columns[n]), left(columns["score"]))[0, 1] for n in ("style", "rouge_l")}
    return {"words": np.corrcoef(x, columns["score"])[0, 1], **held}


@pytest.mark.parametrize(
    "score",
    [noise, lambda text, rng: rng.gauss(0, 5) + len(words(text)), lambda text, rng: 9 * rouge_l(text, TEACHER)],
    ids=["noise", "length", "likeness"],
)
def test_against_the_correlations_written_out(score: Score) -> None:
    rows = evaluation(score)
    found = associations(rows)
    assert {name: each.correlation for name, each in found.items()} == pytest.approx(literal(rows))
    assert all(each.low <= each.correlation <= each.high for each in found.values())


def test_a_score_of_length_says_nothing_at_equal_length() -> None:
    found = associations(evaluation(lambda text, rng: len(words(text)) + rng.gauss(0, 0.1)))
    assert found["words"].sign == 1 and found["words"].correlation > 0.99
    assert abs(found["rouge_l"].correlation) < 0.2 and abs(found["style"].correlation) < 0.2
    assert associations(evaluation(lambda text, rng: -len(words(text)) + rng.gauss(0, 1)))["words"].sign == -1


def test_a_score_of_likeness_shows_at_equal_length() -> None:
    found = associations(evaluation(lambda text, rng: rouge_l(text, TEACHER) + rng.gauss(0, 0.02)))
    assert found["rouge_l"].sign == 1 and found["rouge_l"].correlation > 0.9


def test_noise_is_nothing() -> None:
    assert [each.sign for each in associations(evaluation(noise)).values()] == [0, 0, 0]
    assert Association(0.1, -0.1, 0.3).sign == 0


def test_what_says_nothing_is_absent() -> None:
    rows = evaluation(noise)
    assert associations(rows[:1]) == {} and associations(evaluation(noise, samples=1)) == {}
    for sample in rows[0]["samples"][:1]:
        del sample["score"]
    assert associations(rows) == {}
    assert associations([{**row, "samples": None} for row in evaluation(noise)]) == {}
    assert associations(evaluation(lambda text, rng: 0.0)) == {}
    # Of equal length, all of it is told by length.
    assert associations(evaluation(lambda text, rng: 1e6 * len(words(text)))).keys() == {"words"}


def test_equal_samples_have_no_correlation() -> None:
    rows = evaluation(noise)
    for row in rows:
        for sample in row["samples"]:
            sample |= {"text": "an old mill", "finished": True}
    assert associations(rows) == {}
    # Of one length: what is left of style and likeness is all of them.
    rng = random.Random(5)
    for row in rows:
        for sample in row["samples"]:
            sample["text"] = " ".join(rng.choices(WORDS[:6], k=5))
    assert "words" not in associations(rows) and "rouge_l" in associations(rows)
