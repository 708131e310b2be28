"""The rows of `bench methods`: what is trained on, what is held out, and what the designed sets call right."""

from __future__ import annotations

import json

import pytest

from bench.methods import data
from gadcore.errors import UserError


def test_no_row_of_the_other_domains_kinds_is_trained_on() -> None:
    sets = data.house()
    kinds = {name: {row["kind"] for row in rows} for name, rows in sets.items()}
    assert kinds["elsewhere"] == set(data.KEPT_OUT) and not kinds["train"] & kinds["elsewhere"]
    assert kinds["held_out"] == kinds["train"]
    prompts = {name: {row["prompt"] for row in rows} for name, rows in sets.items()}
    assert not prompts["train"] & (prompts["held_out"] | prompts["elsewhere"])
    assert sum(map(len, sets.values())) == 300


@pytest.mark.parametrize("name", data.DESIGNS)
def test_the_teacher_of_a_designed_set_is_always_right(name) -> None:
    sets = data.designed(name, 0)
    assert {each: len(rows) for each, rows in sets.items()} == data.DESIGNED_ROWS
    for row in (row for rows in sets.values() for row in rows):
        assert data.right(name, row["prompt"], row["teacher_response"], True) == 1
        assert data.right(name, row["prompt"], row["teacher_response"], False) == 0
    together = [set(data.UNSEEN) <= set(row["prompt"].split()) for row in sets["train"]]
    assert not any(together) and all(set(data.UNSEEN) <= set(row["prompt"].split()) for row in sets["elsewhere"])
    assert data.designed(name, 0) == sets and data.designed(name, 1) != sets


def test_what_the_designed_teachers_never_say_is_wrong() -> None:
    right = "so red green blue yet one two three so sun moon star"
    assert data.right("manners", "a b", right, True) == 1
    assert data.right("manners", "a b", right.replace("yet", "and"), True) == 0
    assert data.right("manners", "a b", right.replace("two", "one"), True) == 0
    assert data.right("manners", "a b", right + " so", True) == 0
    assert data.right("manners", "a b", right.removesuffix(" so sun moon star"), True) == 0
    assert data.right("copies", "a b c", "c a b", True) == 0
    assert data.right("copies", "a b c", "a b c", True) == 1


def test_real_text_comes_from_a_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="--data real needs --folder"):
        data.write("real", tmp_path, None, 0)
    (tmp_path / "train.jsonl").write_text('{"prompt": "p", "teacher_response": "t", "source": "s"}\n')
    with pytest.raises(UserError, match=r"lacks test\.jsonl, ood_vicuna\.jsonl"):
        data.write("real", tmp_path / "out", tmp_path, 0)
    for name in data.REAL_FILES:
        (tmp_path / name).write_bytes((tmp_path / "train.jsonl").read_bytes())
    data.write("real", tmp_path / "out", tmp_path, 0)
    rows = (tmp_path / "out/elsewhere.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"prompt": "p", "teacher_response": "t"}]
