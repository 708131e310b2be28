"""The rows of a run's evaluations, as the report and doctor-d read them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.record import evaluations

ROW = {"prompt": "a", "teacher": "b", "student": "c", "rouge_l": 0.5, "length_ratio": 1.0}


def written(run: Path, name: str, *rows: object, after: str = "") -> Path:
    path = run / evaluations.FOLDER / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + after)
    return path


def test_they_come_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    for second, name in enumerate(("z", "a", "m")):
        os.utime(written(tmp_path, name, ROW), (second, second))
    assert list(evaluations.paths(tmp_path)) == ["z", "a", "m"]


def test_a_last_line_that_is_torn_is_left_out_and_told(tmp_path: Path) -> None:
    found = evaluations.read(written(tmp_path, "x", ROW, after='{"prompt": "'))
    assert found.rows == [ROW] and found.torn


@pytest.mark.parametrize(
    ("change", "field"),
    [({"prompt": 3}, "prompt"), ({"rouge_l": 2}, "rouge_l"), ({"samples": []}, "samples"),
     ({"samples": [{"text": "a"}]}, "samples.0.finished"), ({"teacher_score": 1e200}, "teacher_score")],
)  # fmt: skip
def test_a_damaged_row_is_named(change: dict[str, object], field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2 is damaged \({field}"):
        evaluations.read(written(tmp_path, "x", ROW, ROW | change))
