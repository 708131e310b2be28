"""Several responses to a prompt on disk: their order, their means, and what judges read of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.evaluate.measure import measure_set, teacher_values, values_of
from gadcore.evaluate.responses import ResponseRow, by_prompt, read_first, read_responses, write_responses


def rows(texts: list[list[str]], reference: str = "one two three") -> list[ResponseRow]:
    return [
        ResponseRow(f"p{i}", ({"role": "user", "content": f"p{i}"},), reference, text, True, f"s:{i}", True, i, k)
        for i, each in enumerate(texts)
        for k, text in enumerate(each)
    ]


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = rows([["a", "b"], ["c", "d"]])
    write_responses(tmp_path / "m.jsonl", made)
    assert read_responses(tmp_path / "m.jsonl") == made
    assert [row.response for row in read_first(tmp_path / "m.jsonl")] == ["a", "c"]
    # One response to a prompt is written as it always was.
    write_responses(tmp_path / "one.jsonl", rows([["a"], ["b"]]))
    assert "sample" not in json.loads((tmp_path / "one.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 3, 2], [1, 0, 2, 3], [0, 2, 1, 3]])
def test_a_response_out_of_its_place_is_told(order: list[int], tmp_path: Path) -> None:
    made = rows([["a", "b"], ["c", "d"]])
    write_responses(tmp_path / "m.jsonl", [made[i] for i in order])
    said = "are no whole number of 2 samples" if len(order) == 3 else "is out of its place"
    with pytest.raises(UserError, match=said):
        read_responses(tmp_path / "m.jsonl")


def test_measures_are_means_over_the_responses_of_a_prompt() -> None:
    made = rows([["one two three", "four"], ["one two three", "one two three"]])
    assert by_prompt(made, [1.0, 3.0, 5.0, 6.0]) == [2.0, 5.5]
    values = values_of(made)
    assert values["rouge_l"] == [0.5, 1.0] and values["words"] == [2.0, 3.0] and values["word_range"] == [0.5, 1.0]
    # Two bigrams that both prompts have: over four texts of two draws 2 of 6 would be distinct, over two 2 of 4.
    same = values_of(rows([["one two three"] * 2, ["one two three"] * 2]))["distinct_2"]
    assert sum(same) / 2 == 0.5
    assert {len(column) for column in values.values()} == {2}
    assert {len(column) for column in teacher_values(made).values()} == {2}


def test_models_with_different_numbers_of_responses_are_not_compared(tmp_path: Path) -> None:
    write_responses(tmp_path / "a.jsonl", rows([["x"], ["y"]]))
    write_responses(tmp_path / "b.jsonl", rows([["x", "x"], ["y", "y"]]))
    with pytest.raises(UserError, match=r"different numbers of responses to a prompt: draw as many of each"):
        measure_set(tmp_path, ["a", "b"], resamples=10, fresh=None)
