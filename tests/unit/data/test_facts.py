"""Facts of rows: what is counted is named."""

from __future__ import annotations

import json

import pytest

from gadcore.data.facts import Facts, Survey, named
from gadcore.data.forms import RawRow


def survey(*rows: tuple[str, str, str]) -> Facts:
    seen = Survey()
    for prompt, response, where in rows:
        seen.add(RawRow(({"role": "user", "content": prompt},), response, where), 3, 4)
    return seen.facts(10, 10)


@pytest.mark.parametrize(
    ("places", "count", "text"),
    [
        ([], 0, ""),
        (["a.csv:3"], 1, "line 3 of a.csv"),
        (["a.csv:3", "a.csv:8"], 4, "lines 3, 8 and 2 more of a.csv"),
        (["x/a[1].parquet[0]", "x/a[1].parquet[5]"], 2, "rows 0, 5 (from 0) of x/a[1].parquet"),
        (["a.csv:3", "b.parquet[0]"], 3, "a.csv:3, b.parquet[0] and 1 more"),
        (["somewhere", "somewhere"], 2, "somewhere, somewhere"),
    ],
)
def test_places_are_told_with_their_file(places: list[str], count: int, text: str) -> None:
    assert named(places, count) == text


def test_rows_are_named_wherever_they_are() -> None:
    found = survey(
        ("a", "Sorry.", "a.csv:2"),
        ("b", "Fine.", "b.json[0]"),
        ("a", "Sorry.", "b.json[7]"),
        ("b", "Nice.", "elsewhere"),
        ("a", "x", "a.csv:9"),
    )
    assert found.places["refusals"] == ["a.csv:2", "b.json[7]"]
    assert found.places["repeated_prompts"] == ["b.json[7]", "elsewhere", "a.csv:9"]
    assert (found.refusals, found.repeated_prompts, found.repeated_rows) == (2, 3, 1)
    assert Facts.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_of_many_rows_the_first_ten_are_kept() -> None:
    found = survey(*(("a", "Sorry.", f"a.csv:{i}") for i in range(2, 40)))
    assert found.named("refusals", found.refusals).endswith("10, 11 and 28 more of a.csv")
    assert (
        found.named("repeated_prompts", 37).startswith("lines 3, 4, ") and len(found.places["repeated_prompts"]) == 10
    )
