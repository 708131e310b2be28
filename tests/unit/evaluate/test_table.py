"""Measures of responses on disk, and the table made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.evaluate.measure import measure_set, measures_of
from gadcore.evaluate.responses import ResponseRow, write_json, write_responses
from gadcore.evaluate.table import evaluation_section, markdown, sections_of
from gadcore.files import file_name

REFERENCES = ["Paris is a city on the Seine.", "Water boils.", "Zero degrees", "A short answer of five words"]


def write_model(folder: Path, name: str, texts: list[str], finished: list[bool] | None = None, shift: int = 0) -> None:
    rows = [
        ResponseRow(f"p{i}", ({"role": "user", "content": f"p{i}"},), reference, text, done, f"s:{i}", True, i + shift)
        for i, (reference, text, done) in enumerate(zip(REFERENCES, texts, finished or [True] * 4, strict=True))
    ]
    write_responses(folder / f"{name}.jsonl", rows)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_model(tmp_path, "before", ["wrong"] * 4, [True, False, True, True])
    write_model(tmp_path, "gad", REFERENCES)
    return tmp_path


def test_measures_of_the_same_text_and_of_another(folder: Path) -> None:
    results, differences, prompts = measure_set(folder, ["before", "gad"], resamples=200, fresh=None)
    assert prompts == 4
    assert results["gad"]["rouge_l"] == {"mean": 1.0, "interval": [1.0, 1.0], "n": 4}
    assert results["before"]["ngram_f1_1"]["mean"] == 0
    assert results["before"]["words"]["mean"] == 1 and results["teacher"]["words"]["mean"] == (7 + 2 + 2 + 6) / 4
    assert results["before"]["distinct_1"]["mean"] == pytest.approx(1 / 4)
    assert results["before"]["cut_share"]["mean"] == 0.25
    # Wilson's: nothing was cut in 4 rows, which does not make it certain that nothing ever is.
    assert results["gad"]["cut_share"]["interval"] == [0.0, pytest.approx(0.4899, abs=1e-4)]
    assert differences.keys() == {"gad"}
    assert differences["gad"]["rouge_l"]["mean"] == 1 and differences["gad"]["cut_share"]["mean"] == -0.25
    assert set(results["teacher"]) < set(results["gad"])


def test_judge_scores_are_taken_in_where_there_are_some(folder: Path) -> None:
    for judge in ("x/one", "two"):
        score = {"judge": judge, "score": 48.5, "interval": [40.0, 55.0], "n": 4, "unparsable": 1}
        write_json(folder / "judge" / file_name(judge) / "gad.json", score)
    results, differences, _ = measure_set(folder, ["before", "gad"], resamples=50, fresh=None)
    for judge in ("x/one", "two"):
        assert results["gad"][f"judge_score {judge}"] == {
            "mean": 48.5, "interval": [40.0, 55.0], "n": 4, "unparsable": 1
        }  # fmt: skip
        assert f"judge_score {judge}" not in results["before"] | differences["gad"]
    assert [m.label for m in measures_of(results)][-2:] == ["judge score by two", "judge score by x/one"]
    (folder / "judge/two/gad.json").write_text('{"judge": "two", "score": 1}')
    with pytest.raises(UserError, match=r"judge/two/gad.json is damaged \(interval: missing\): run the judge again"):
        measure_set(folder, ["gad"], resamples=50, fresh=None)


def test_a_fresh_discriminators_verdicts_are_compared_prompt_by_prompt(folder: Path) -> None:
    kept = []

    def fresh(rows, path):
        kept.append(path.name)
        correct = [1.0, 1.0, 1.0, 1.0] if rows[0].response == "wrong" else [1.0, 0.0, 0.5, 0.5]
        accuracy = sum(correct) / 4
        extra = {"margin": 0.1, "train_accuracy": 1.0, "steps": 3}
        return {"accuracy": accuracy, "interval": (0.2, 1.0), "n": 4, "correct": correct, **extra}

    results, differences, _ = measure_set(folder, ["before", "gad"], resamples=200, fresh=fresh)
    assert kept == ["fresh-before.json", "fresh-gad.json"]
    assert results["gad"]["fresh_accuracy"]["mean"] == 0.5 and results["before"]["fresh_accuracy"]["steps"] == 3
    assert differences["gad"]["fresh_accuracy"]["mean"] == -0.5


def test_other_prompts_are_refused(folder: Path) -> None:
    write_model(folder, "other", REFERENCES, shift=1)
    with pytest.raises(UserError, match=r"other.jsonl and .*before.jsonl hold different prompts"):
        measure_set(folder, ["before", "other"], resamples=50, fresh=None)


def evaluation(folder: Path, name: str = "test|<b>") -> dict:
    results, differences, prompts = measure_set(folder, ["before", "gad"], resamples=200, fresh=None)
    found = {"domain": "out", "source": "s.jsonl", "prompts": prompts, "results": results, "differences": differences}
    return {"models": {"before": "m", "gad": "runs/x"}, "sets": {name: found}, "notes": ["1 of 4 <cut>"]}


def test_a_part_has_a_column_per_model_and_per_difference(folder: Path) -> None:
    (part,) = sections_of(evaluation(folder))
    assert part.columns == ("teacher", "before", "gad", "gad − before")
    rows = {label: cells for label, cells, _ in part.rows}
    assert rows["ROUGE-L"] == ("–", "0.000 [0.000, 0.000]", "1.000 [1.000, 1.000]", "+1.000 [+1.000, +1.000] *")
    assert rows["responses cut"][3].startswith("-25.0 pp [") and not rows["responses cut"][3].endswith("*")
    assert "judge score by j" not in rows and "fresh D tells apart" not in rows
    assert "out of domain, 4 prompts of s.jsonl" in part.title


def test_a_judge_without_a_usable_verdict_is_shown_as_such(folder: Path) -> None:
    write_json(folder / "judge/j/before.json", {"judge": "j", "score": None, "interval": None, "n": 0, "unparsable": 8})
    write_json(
        folder / "judge/j/gad.json", {"judge": "j", "score": 48.5, "interval": [40.0, 55.0], "n": 4, "unparsable": 0}
    )
    (part,) = sections_of(evaluation(folder))
    rows = {label: cells for label, cells, _ in part.rows}
    assert rows["judge score by j"] == ("–", "– (8 unparsable)", "48.500 [40.000, 55.000]", "–")


def test_markdown_is_a_table_whose_rows_have_equal_widths(folder: Path) -> None:
    text = markdown(evaluation(folder, "test"))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 13 and {line.count("|") for line in table} == {7}
    assert "- gad: `runs/x`" in text and "- 1 of 4 &lt;cut&gt;" in text


def test_the_reports_section_escapes_what_it_shows(folder: Path) -> None:
    assert evaluation_section(folder) is None
    write_json(folder / "evaluation.json", evaluation(folder))
    page = evaluation_section(folder)
    assert page is not None and "test|&lt;b&gt;" in page and "1 of 4 &lt;cut&gt;" in page and "<b>" not in page
    assert page.count("<tr>") == 1 + 13


def test_the_json_is_plain(folder: Path) -> None:
    made = evaluation(folder)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
