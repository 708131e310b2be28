"""Many rows: what is read from the file of encoded rows is what few rows become, and it is written once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gadcore.config.data import DataSettings
from gadcore.data import encoded
from gadcore.data.batches import Loader
from gadcore.data.encoded import EncodedGroups, Rows, Subset, prompt_keys, split_off, token_lengths
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.sources import Source
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.files import temporary
from tests.support.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer())


def write(path: Path, count: int = 2500) -> Path:
    rows = [
        {"prompt": f"Näme {i % 900} 🙂", "teacher_response": f"It is {i}." * (1 + i % 3) + "<|im_end|>" * (i % 5 == 0)}
        for i in range(count)
    ]
    rows[7]["prompt"] = "x" * 400
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, template: ChatTemplate, cache: Path, **settings: Any) -> tuple[Any, Any, list[str]]:
    limits: dict[str, Any] = {"max_prompt_tokens": 60, "max_response_tokens": 16, "long_prompt": "drop"}
    data = DataSettings.model_validate(limits | settings)
    return Rows(Source.find(str(path), "train"), data, settings.get("train_rows")).groups(template, cache, print)


def test_many_rows_become_what_few_rows_become(tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl")
    few, of_few, said = read(path, template, tmp_path)
    assert isinstance(few, list) and said == [] and not (tmp_path / "rows").exists()
    assert of_few.dropped_prompts == 1 and of_few.cut_responses and of_few.ended == 500
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    for verb in ("encoded once and kept", "read as they were encoded before"):
        many, of_many, (said,) = read(path, template, tmp_path)
        assert verb in said and str(tmp_path / "rows") in said
        assert isinstance(many, EncodedGroups) and list(many) == few
        assert of_many == of_few and of_many.facts == of_few.facts
        assert [list(a) for a in token_lengths(many)] == [list(a) for a in token_lengths(few)]
        assert (prompt_keys(many) == prompt_keys(few)).all()
        assert many[-1] == few[-1] and list(many[3:9:2]) == few[3:9:2]
        with pytest.raises(IndexError):
            many[len(few)]
        loaders = [Loader(groups, 64, seed=3) for groups in (few, many)]
        assert [next(loaders[0]) for _ in range(45)] == [next(loaders[1]) for _ in range(45)]


def test_it_is_said_how_far_the_encoding_is(tmp_path: Path, template: ChatTemplate, monkeypatch, capsys) -> None:
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    monkeypatch.setattr(encoded, "_SILENCE", 0)
    read(write(tmp_path / "rows.jsonl", 30), template, tmp_path)
    assert "rows.jsonl, which is done once: 20 so far" in capsys.readouterr().out


def test_a_second_time_no_row_is_read(tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    first, *_ = read(path, template, tmp_path)
    monkeypatch.setattr(encoded, "read_rows", lambda *a, **k: iter([None]))  # would fail if it was used
    again, *_ = read(path, template, tmp_path)
    assert list(again) == list(first)


@pytest.mark.parametrize(
    "change", ["content", "limit", "rows", "columns", "policy", "template", "name", "bad rows", "response limit"]
)
def test_what_the_encoded_rows_depend_on(change: str, tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    read(path, template, tmp_path)
    settings: dict[str, Any] = {}
    if change == "content":
        path.write_text(path.read_text().replace("It is 3.", "It is 4."))
    elif change == "template":
        template = ChatTemplate(tiny_tokenizer(), system_prompt="Be brief.")
    elif change == "name":
        path = path.rename(tmp_path / "other.jsonl")
    else:
        settings = {
            "limit": {"max_prompt_tokens": 59},
            "response limit": {"max_response_tokens": 15},
            "rows": {"train_rows": 20},
            "columns": {"columns": {"prompt": "prompt"}},
            "policy": {"long_prompt": "truncate"},
            "bad rows": {"bad_rows": "skip"},
        }[change]
    _, _, (said,) = read(path, template, tmp_path, **settings)
    assert "encoded once" in said and len(list((tmp_path / "rows").iterdir())) == 2


@pytest.mark.parametrize("name", ["rows.arrow", "report.json", "index.npy"])
def test_a_damaged_file_is_told(name: str, tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    read(path, template, tmp_path)
    (file,) = (tmp_path / "rows").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"the encoded rows in {file.parent} are damaged: delete that folder"):
        read(path, template, tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    read(path, template, tmp_path)
    (folder,) = (tmp_path / "rows").iterdir()
    shutil.rmtree(folder)
    left = {name: temporary(folder) for name in ("old", "new")}
    for place in left.values():
        place.mkdir()
        (place / "rows.arrow").write_text("half")
    for file in (left["old"], left["old"] / "rows.arrow"):
        os.utime(file, (0, 0))
    read(path, template, tmp_path)
    assert folder.is_dir() and left["new"].is_dir() and not left["old"].exists()


def test_bad_rows_leave_nothing_behind(tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    path.write_text(path.read_text() + "{\n")
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    with pytest.raises(UserError, match=r"rows.jsonl:31: broken JSON.*\(--data.bad_rows skip leaves such rows out\)"):
        read(path, template, tmp_path)
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be kept in .*GADCORE_CACHE"):
        read(path, template, tmp_path / "cache")


@pytest.mark.parametrize("many", [False, True])
def test_skipped_rows_are_counted_and_named(many: bool, tmp_path: Path, template: ChatTemplate, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    good, *_ = read(path, template, tmp_path)
    lines = path.read_text().splitlines()
    bad = ["{", '{"prompt": "a"}', '{"prompt": "a", "teacher_response": "<|im_end|> <|im_end|>\\n"}']
    path.write_text("\n".join([bad[0], *lines[:9], *bad[1:], *lines[9:]]))
    if many:
        monkeypatch.setattr(encoded, "KEPT_FROM", 1)
    groups, report, _ = read(path, template, tmp_path, bad_rows="skip")
    assert [(g.prompt.messages, g.teacher) for g in groups] == [(g.prompt.messages, g.teacher) for g in good]
    first, *listed = report.sentences()[0].splitlines()
    assert first == f'3 of 33 rows of {path} cannot be used and were left out (data.bad_rows = "skip")'
    assert [line.split(": ")[0].strip() for line in listed] == [f"{path}:{n}" for n in (1, 11, 12)]
    with pytest.raises(UserError) as caught:
        read(path, template, tmp_path)
    assert str(caught.value).startswith(
        f"3 of 33 rows of {path} cannot be used: mend them, or leave them out by --data.bad_rows skip"
    )
    assert "nothing but an end marker" in str(caught.value)


def test_a_limit_that_is_an_error_is_no_bad_row(tmp_path: Path, template: ChatTemplate) -> None:
    path = write(tmp_path / "rows.jsonl", 30)
    with pytest.raises(UserError, match=r"rows.jsonl:8: the prompt has \d+ tokens, data.max_prompt_tokens allows 60"):
        read(path, template, tmp_path, bad_rows="skip", long_prompt="error")


def groups_of(prompts: list[int]) -> list[Group]:
    return [
        Group(Prompt(i, ({"role": "user", "content": str(p)},), (i,)), Response(str(i), (i,), True))
        for i, p in enumerate(prompts)
    ]


def names(groups: Any) -> list[tuple[str, str]]:
    return [(group.prompt.messages[0]["content"], group.teacher.text) for group in groups]


@pytest.mark.parametrize(("count", "share", "most", "held"), [(100, 0.1, None, 10), (100, 0.1, 4, 4), (2, 0.1, None, 1),
                                                              (3, 0.9, None, 2), (7, 0.0001, 5, 1)])  # fmt: skip
def test_a_share_is_split_off(count: int, share: float, most: int | None, held: int) -> None:
    groups = groups_of(list(range(count)))
    train, held_out = split_off(groups, share, most, seed=0)
    assert len(held_out) == held
    assert sorted(names(train) + names(held_out)) == sorted(names(groups))
    again = split_off(groups, share, most, seed=0)
    assert names(again[1]) == names(held_out)


def test_the_split_depends_on_seed_and_prompts_alone() -> None:
    prompts = list(range(200))
    first = {prompt for prompt, _ in names(split_off(groups_of(prompts), 0.1, None, 0)[1])}
    turned = {prompt for prompt, _ in names(split_off(groups_of(prompts[::-1]), 0.1, None, 0)[1])}
    other = {prompt for prompt, _ in names(split_off(groups_of(prompts), 0.1, None, 1)[1])}
    assert first == turned and first != other


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_prompt_stay_together(seed: int) -> None:
    train, held_out = split_off(groups_of([i % 13 for i in range(100)]), 0.3, None, seed)
    assert not {p for p, _ in names(train)} & {p for p, _ in names(held_out)}
    assert 15 <= len(held_out) <= 30


@pytest.mark.parametrize("prompts", [[1], [1, 1, 1]])
def test_one_prompt_cannot_be_split(prompts: list[int]) -> None:
    with pytest.raises(UserError, match="too few to hold some out: name held-out rows by data.eval, or set it to none"):
        split_off(groups_of(prompts), 0.1, None, 0)


def test_a_subset_of_a_subset() -> None:
    groups = groups_of(list(range(10)))
    subset = Subset(groups, np.array([8, 2, 5]))
    assert [g.prompt.index for g in subset] == [8, 2, 5]
    assert [g.prompt.index for g in subset[1:]] == [2, 5]
    assert [list(lengths) for lengths in token_lengths(subset[1:])] == [[1, 1], [1, 1]]
