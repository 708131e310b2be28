"""python -m gadcore.run data: what a run would read, from the facts that a run's warnings come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.run import main
from tests.support.runs import run
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_tiny(folder / "model")
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": "1 2 3 " * (i + 1)} for i in range(20)]
    rows[3] = rows[2]
    rows[4] |= {"output": "I'm sorry, but I cannot count.<|im_end|>"}
    rows[6] |= {"output": "1 2 3<br>4 &amp; 5"}
    rows[5] |= {"output": "\u65e5\u672c\u8a9e\u3002", "instruction": "\x1b[31m[bold]red[/bold]"}
    (folder / "mine.json").write_text(json.dumps(rows))
    return folder


def show(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_rows_are_shown_as_a_run_would_read_them(folder: Path, capsys) -> None:
    limits = ("--data.max_prompt_tokens", 96, "--data.max_response_tokens", 100)
    code, said, _ = show(capsys, "data", "--student.model", folder / "model", *limits, folder / "mine.json")
    assert code == 0
    assert f"{folder / 'mine.json'}: 20 rows" in said
    for text in (
        "responses by script: Latin 19, Han 1",
        f"rows with a prompt that was there before: 1, with the same response 1: row 3 (from 0) of {folder}/mine.json",
        f"responses that begin like a refusal: 1: row 4 (from 0) of {folder}/mine.json",
        "responses with tags or entities of HTML, which the student learns to write: 1",
        "rows with the marker of a chat template in a text: <|im_end|> 1",
        "turns: user 20;",
        "1 of 20 teacher responses ended in the text of an end marker, which was taken off",
        "of the 20 rows of",
        "trained on, from here",
        "WARNING: look at these rows first",
    ):
        assert text in said, text
    assert said.count("<|im_start|>assistant") == 3
    assert "\x1b" not in said
    (table,) = (line for line in said.splitlines() if line.strip().startswith("responses   "))
    median, p95, p99, longest, limit, above, share = table.split()[1:]
    assert (
        0 < int(median) < int(p95) <= int(p99) <= int(longest)
        and limit == "100"
        and share == f"({int(above) / 20:.1%})"
    )
    assert f"--data.max_response_tokens {p95} would fit 95 % of the rows, {p99} 99 %, {longest} all" in said


def test_the_default_rows_are_shown_without_an_argument(folder: Path, capsys) -> None:
    code, said, _ = show(capsys, "data", "--student.model", folder / "model", "--data.max_prompt_tokens", 128)
    assert code == 0 and "builtin: 240 rows" in said


def test_refusals_and_repeated_prompts_are_named(folder: Path, capsys) -> None:
    rows = [f'Question {i % 16}?,"{"Sorry, no." if i % 2 else "Yes,"}\nindeed."' for i in range(28)]
    (folder / "named.csv").write_text("\n".join(["prompt,teacher_response", *rows]))
    limits = ("--data.max_prompt_tokens", 96, "--data.max_response_tokens", 100)
    code, said, _ = show(capsys, "data", folder / "named.csv", "--student.model", folder / "model", *limits)
    # A row is two lines, below one of a header.
    assert code == 0
    lines = ", ".join(f"{2 + 2 * i}" for i in range(1, 21, 2))
    assert f"begin like a refusal: 14: lines {lines} and 4 more of {folder}/named.csv\n" in said
    lines = ", ".join(f"{2 + 2 * i}" for i in range(16, 26))
    assert f"with the same response 12: lines {lines} and 2 more of {folder}/named.csv\n" in said


def test_the_words_of_missing_values_are_a_warning(folder: Path, capsys) -> None:
    answers = ["NULL", "Four.", "nan", "None of them.", "#N/A", "null", " NaN ", "N/A", "None", "Five.", "0", "NULL"]
    rows = [f'Question {i}?,"{answer}"' for i, answer in enumerate(answers)]
    (folder / "gaps.csv").write_text("\n".join(["prompt,teacher_response", *rows]))
    settings = ("--student.model", folder / "model", "--data.max_prompt_tokens", 96, "--data.max_response_tokens", 100)
    sentence = (
        "training: 8 of 12 teacher responses are nothing but the word of a missing value (NULL 2, nan 1, #N/A 1, "
        "null 1, NaN 1, N/A 1, None 1): take out those that are no answers, lines 2, 4, 6, 7, 8, 9, 10, 13 of "
        f"{folder}/gaps.csv"
    )
    code, said, _ = show(capsys, "data", folder / "gaps.csv", *settings)
    assert code == 0 and "WARNING: look at these rows first" in said
    assert f"note: {sentence}" in said
    run_settings = ("--data.train", folder / "gaps.csv", "--rollout.engine", "hf", "--dry-run")
    code, _, said = show(capsys, *settings, *run_settings)
    assert code == 0 and "WARNING: look at these rows first" in said
    assert "".join(sentence.split()) in "".join(said.replace("┃", " ").split())


def test_two_files_are_refused(capsys) -> None:
    code, _, said = show(capsys, "data", "a.jsonl", "--run.seed", 3, "b.jsonl")
    assert code == 2 and "data takes one FILE, not a.jsonl b.jsonl" in said


def test_bad_rows_hide_nothing(folder: Path, capsys) -> None:
    good = [{"prompt": f"Question {i}?", "teacher_response": "Sorry, no."} for i in range(12)]
    lines = ['{"a": 1}', "{", *map(json.dumps, good), json.dumps({"prompt": "x", "teacher_response": "<|im_end|>"})]
    (folder / "bad.jsonl").write_text("\n".join(lines))
    settings = ("--student.model", folder / "model", "--data.max_prompt_tokens", 96, "--data.max_response_tokens", 100)
    code, page, said = show(capsys, "data", folder / "bad.jsonl", *settings)
    sentence = (
        f"3 of 15 rows of {folder}/bad.jsonl cannot be used: mend them, or leave them out by --data.bad_rows skip"
    )
    assert code == 2 and said.startswith(f"gadcore: {sentence}\n")
    for place in (":1: no prompt", ":2: broken JSON", ":15: the response is nothing but an end marker"):
        assert said.count(f"bad.jsonl{place}") == 1 and f"bad.jsonl{place}" not in page
    assert f"{folder}/bad.jsonl: 12 rows" in page and "begin like a refusal: 12" in page
    assert "trained on, from here" in page and "left out" not in page
    code, skipping, _ = show(capsys, "data", folder / "bad.jsonl", *settings, "--data.bad_rows", "skip")
    assert code == 0 and "3 of 15 rows" in skipping
    # But for the note on what was left out it is the same page.
    assert all(line in skipping.splitlines() for line in page.splitlines())


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_where_all_rows_are_bad_they_cannot_be_left_out(policy: str, folder: Path, capsys) -> None:
    (folder / "all.csv").write_text("ID,User Question,GPT-4 Answer\n1,Is it?,It is.\n2,Was it?,It was.\n")
    settings = ("--student.model", folder / "model", "--data.bad_rows", policy)
    code, page, said = show(capsys, "data", folder / "all.csv", *settings)
    assert code == 2 and page == "" and "bad_rows" not in said and "left out" not in said
    advice = '--data.columns "prompt=User Question,teacher_response=GPT-4 Answer"'
    assert said.startswith(f"gadcore: 2 of 2 rows of {folder}/all.csv cannot be used: name the columns by {advice}\n")
    (folder / "one.jsonl").write_text("{")
    code, page, said = show(capsys, "data", folder / "one.jsonl", *settings)
    assert code == 2 and page == "" and "one.jsonl:1: broken JSON" in said and "bad_rows" not in said


def test_a_run_warns_before_it_begins(folder: Path, capsys) -> None:
    settings = ("--data.train", folder / "mine.json", "--student.model", folder / "model", "--rollout.engine", "hf")
    limits = ("--data.max_prompt_tokens", 96, "--data.max_response_tokens")
    code, _, said = show(capsys, *settings, *limits, 12, "--dry-run")
    assert code == 0 and "WARNING: look at these rows first" in said
    assert "95 % of the rows need" in " ".join(said.replace("┃", " ").split())
    code, _, said = show(capsys, *settings, *limits, 150, "--data.train_rows", 6, "--dry-run")
    assert code == 0 and "WARNING" not in said


def test_a_pipe_that_speaks_ascii_alone(folder: Path, monkeypatch) -> None:
    (folder / "far.jsonl").write_text(
        json.dumps({"prompt": "x", "teacher_response": "\u65e5"}) + "\n" + '{"prompt": "y", "teacher_response": "z"}'
    )
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    settings = ("--student.model", folder / "model", "--data.max_prompt_tokens", 96, "--data.max_response_tokens", 24)
    done = run(["data", str(folder / "far.jsonl"), *map(str, settings)], folder)
    assert done.returncode == 0, done.stderr
    assert "trained on, from here" in done.stdout and "\\u65e5" in done.stdout


def test_help_names_the_command(capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["data", "--help"])
    said = capsys.readouterr().out
    assert leaving.value.code == 0 and "--data.bad_rows" in said
    assert said.startswith("usage: gadcore data FILE") and "--dry-run" not in said


def test_every_bad_row_has_a_line(folder: Path, capsys) -> None:
    (folder / "bad.json").write_text(json.dumps([{"prompt": "x"}, {"prompt": "x", "response": "y"}, {}, 5]))
    code, _, said = show(capsys, "data", folder / "bad.json", "--student.model", folder / "model")
    lines = said.splitlines()
    assert code == 2 and lines[0].startswith("gadcore: 4 of 4 rows of ")
    assert [line.split(":")[0].strip().endswith(f"bad.json[{i}]") for i, line in enumerate(lines[1:])] == [True] * 4
