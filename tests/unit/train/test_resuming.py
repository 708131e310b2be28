"""A run goes on only with the rows and the records that its checkpoint counts on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gadcore.checkpoint import store
from gadcore.config.settings import AlgorithmSettings, Config, MemorySettings, RunSettings, StudentSettings
from gadcore.data import encoded
from gadcore.data.batches import Loader
from gadcore.data.encoded import EncodedGroups, Subset
from gadcore.data.groups import Group, Response
from gadcore.errors import UserError
from gadcore.memory.colocation import Colocation
from gadcore.models.student import Student
from gadcore.record import run_folder as run_folder_module
from gadcore.record import tracking
from gadcore.record.run_folder import RunFolder, run_folder
from gadcore.train.checkpoints import Checkpoints
from gadcore.train.progress import Progress
from gadcore.train.resuming import check, chosen, fingerprint, finished
from tests.support.builders import groups
from tests.support.tiny import tiny_model

DATA = {"train": "one", "eval": "two"}


def saved(folder: RunFolder, step: int) -> store.Checkpoint:
    counts = folder.counts()
    state = {"data": DATA, "records": counts, "digests": folder.digests(counts)}
    store.save(folder.checkpoints, step, {}, state, keep=9)
    return store.load(store.at(folder.checkpoints, step))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run of six steps, with checkpoints of steps 2 and 4."""
    with run_folder(Config(run=RunSettings(dir=str(tmp_path / "run")))) as made:
        made.write_evaluation("before", [{"prompt": "a"}, {"prompt": "b"}])
        for step in range(1, 7):
            made.step({"step": step})
            made.samples.write({"step": step})
            if step in (2, 4):
                saved(made, step)
    made.metrics.close()
    made.samples.close()
    return made


def newest(folder: RunFolder) -> store.Checkpoint:
    path = store.latest(folder.checkpoints)
    assert path
    return store.load(path)


def cut(path: Path, lines: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def test_untouched_records_pass(folder: RunFolder) -> None:
    assert check(Config(), DATA, folder, newest(folder)) == []
    # What came after the checkpoint is made again.
    cut(folder.metrics.path, 4)
    with folder.metrics.path.open("a") as file:
        file.write('{"step": 5, "to')
    assert check(Config(), DATA, folder, newest(folder)) == []


@pytest.mark.parametrize("key", ["train", "eval"])
def test_other_rows_are_told(folder: RunFolder, key: str) -> None:
    with pytest.raises(UserError, match=rf"rows are not those of the checkpoint of step 4 \(data.{key} = builtin\)"):
        check(Config(), DATA | {key: "three"}, folder, newest(folder))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: (p / "metrics.jsonl").unlink(), "metrics.jsonl has no rows of step 1"),
        (lambda p: cut(p / "metrics.jsonl", 3), "metrics.jsonl has no rows of step 4"),
        (lambda p: (p / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st'), "has no rows of step 3"),
        (lambda p: (p / "metrics.jsonl").write_text('{"step": 1}\n' * 2 + '{"step": 2}\n'), "has 2 rows of step 1"),
        (lambda p: (p / "samples.jsonl").unlink(), "samples.jsonl is missing"),
        (lambda p: cut(p / "samples.jsonl", 3), "samples.jsonl has 3 rows, at the checkpoint it had 4"),
        (lambda p: (p / "evaluations/before.jsonl").unlink(), "before.jsonl is missing"),
        (lambda p: cut(p / "evaluations/before.jsonl", 1), "before.jsonl has 1 rows, at the checkpoint it had 2"),
    ],
)
def test_missing_records_are_told_with_the_ways_out(folder: RunFolder, damage: Callable, told: str) -> None:
    damage(folder.path)
    with pytest.raises(UserError, match=told) as error:
        check(Config(), DATA, folder, newest(folder))
    assert "the checkpoint of step 4 counts on it" in str(error.value)
    assert "--resume step-000002" in str(error.value)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("evaluations/before.jsonl", '"a"', '"c"', "changed in its first 2 rows"),
        # As many rows, none of them new.
        ("evaluations/before.jsonl", '"a"}\n{"prompt": "b"', '"b"}\n{"prompt": "a"', "changed in its first 2 rows"),
        ("samples.jsonl", '{"step": 2}', '{"step": 2, "reward": 9}', "changed in its first 4 rows"),
        ("metrics.jsonl", '{"step": 4}', '{"step": 4, "loss": 0}', "changed in its first 4 rows"),
    ],
)
def test_records_that_were_changed_are_told(folder: RunFolder, file: str, old: str, new: str, told: str) -> None:
    swap(folder.path / file, old, new)
    with pytest.raises(UserError, match=f"{file} has been {told}, and the checkpoint of step 4 counts on it"):
        check(Config(), DATA, folder, newest(folder))


def test_what_the_checkpoint_does_not_count_on_may_change(folder: RunFolder) -> None:
    for file in ("metrics.jsonl", "samples.jsonl"):
        swap(folder.path / file, '{"step": 5}', '{"step": 5, "x": 1}')
    folder.write_evaluation("after_warmup", [{"prompt": "a"}])
    assert check(Config(), DATA, folder, newest(folder)) == []
    # An older gadcore kept no digests.
    store.save(folder.checkpoints, 4, {}, {"data": DATA, "records": folder.counts()}, keep=9)
    swap(folder.path / "evaluations/before.jsonl", '"a"', '"c"')
    assert check(Config(), DATA, folder, newest(folder)) == []


def test_a_checkpoint_that_says_nothing_of_rows_is_told(folder: RunFolder) -> None:
    store.save(folder.checkpoints, 5, {}, {}, keep=9)
    (note,) = check(Config(), DATA, folder, newest(folder))
    assert "does not say with which rows" in note


@pytest.mark.parametrize(
    ("stage", "step", "kl_coef"), [("gad", 1, 0.1), ("gad", 0, 0.1), ("warmup", 4, 0.1), ("gad", 1, 0)]
)
def test_a_missing_reference_is_told_where_one_is_needed(
    folder: RunFolder, stage: str, step: int, kl_coef: float
) -> None:
    progress = {"stage": stage, "stage_step": step, "done": []}
    store.save(folder.checkpoints, 5, {}, {"data": DATA, "records": {}, "progress": progress}, keep=9)
    config = Config(algorithm=AlgorithmSettings(kl_coef=kl_coef))
    if (stage, step, kl_coef) != ("gad", 1, 0.1):
        assert check(config, DATA, folder, newest(folder)) == []
        return
    with pytest.raises(UserError, match="the reference policy is missing from .*reference: put it back"):
        check(config, DATA, folder, newest(folder))
    store.save(folder.reference, 4, {}, {}, keep=1)
    assert check(config, DATA, folder, newest(folder)) == []


def test_the_checkpoint_to_go_on_from(folder: RunFolder) -> None:
    assert chosen(folder, "auto") == folder.checkpoints / "step-000004"
    assert chosen(folder, "step-000002") == chosen(folder, "step-2") == folder.checkpoints / "step-000002"
    with pytest.raises(UserError, match="no such checkpoint, there are: step-000002, step-000004"):
        chosen(folder, "step-000003")


def test_going_back_sets_aside_what_came_after(folder: RunFolder) -> None:
    folder.write_evaluation("after_warmup", [{}])
    folder.write_summary({"stages": ["warmup"]})
    (folder.path / "student").mkdir()
    aside = folder.go_back(2, ["before"])
    assert aside == folder.path / "abandoned-after-000002"
    there = {str(path.relative_to(aside)) for path in aside.rglob("*")}
    records = {"metrics.jsonl", "samples.jsonl", "summary.json", "student"}
    assert there == records | {"evaluations", "evaluations/after_warmup.jsonl"}
    assert (aside / "metrics.jsonl").read_bytes() == folder.metrics.path.read_bytes()
    assert (folder.path / "evaluations/before.jsonl").exists()
    assert folder.summary() is None
    folder.metrics.truncate_after(2)
    folder.samples.truncate_after(2)
    assert folder.go_back(2, ["before"]) is None


def test_a_finished_run_is_known_by_its_summary(folder: RunFolder) -> None:
    config = Config(run=RunSettings(dir=str(folder.path), resume="auto"))
    assert finished(config, ["warmup", "gad"]) is None
    folder.write_summary({"stages": ["warmup", "gad"]})
    assert finished(config, ["warmup", "gad"]) == folder.path
    with pytest.raises(UserError, match="is a run of warmup and gad, not of seqkd"):
        finished(config, ["seqkd"])
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json cannot be read .*or delete it"):
        finished(config, ["warmup", "gad"])


def in_memory(rows: Sequence[Group], tmp_path: Path) -> Sequence[Group]:
    return rows


def on_the_disk(rows: Sequence[Group], tmp_path: Path) -> Sequence[Group]:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    encoded.write(folder, rows)
    return EncodedGroups(folder)


def of_many(rows: Sequence[Group], tmp_path: Path) -> Sequence[Group]:
    """Some of the rows on the disk, as training rows are where others are held out."""
    places = np.arange(0, 2 * len(rows), 2)
    return Subset(on_the_disk([row for row in rows for _ in range(2)], tmp_path), places)


@pytest.mark.parametrize("kept", [in_memory, on_the_disk, of_many])
def test_a_fingerprint_knows_every_row_and_its_place(
    kept: Callable[[Sequence[Group], Path], Sequence[Group]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept is not in_memory:
        # A million of them would take minutes.
        monkeypatch.setattr(EncodedGroups, "_group", lambda *_: pytest.fail("a group was made"))
    rows = groups(3)
    mine = fingerprint(kept(rows, tmp_path))
    assert mine == fingerprint(kept([Group(group.prompt, group.teacher) for group in rows], tmp_path))
    first, *others = rows
    text = Response(first.teacher.text + " ", first.teacher.token_ids, first.teacher.finished)
    ids = Response(first.teacher.text, first.teacher.token_ids[:-1], first.teacher.finished)
    cut = Response(first.teacher.text, first.teacher.token_ids, not first.teacher.finished)
    # The same ids, with another border between prompt and response.
    border = replace(first.prompt, token_ids=(*first.prompt.token_ids, first.teacher.token_ids[0]))
    short = Response(first.teacher.text, first.teacher.token_ids[1:], first.teacher.finished)
    asked = replace(first.prompt, messages=({"role": "user", "content": "Else?"},))
    changed = [
        [*others, first],
        others,
        [Group(first.prompt, text), *others],
        [Group(first.prompt, ids), *others],
        [Group(first.prompt, cut), *others],
        [Group(border, short), *others],
        [Group(asked, first.teacher), *others],
        [],
    ]
    assert len({mine, *(fingerprint(kept(each, tmp_path)) for each in changed)}) == len(changed) + 1


def test_a_reference_in_autocasts_dtype_is_restored_to_the_bit(tmp_path) -> None:
    """Also from what an older gadcore saved: fp32, which autocast would round in every pass."""
    settings = StudentSettings(autocast="bfloat16")
    pupil = Student(tiny_model(tied=False), settings, AlgorithmSettings(), temperature=1.0, micro_batch_tokens=64)
    memory = Colocation(torch.device("cpu"), MemorySettings(offload="none"), tmp_path, shared=True)
    folder = RunFolder(tmp_path)
    checkpoints = Checkpoints(folder, memory, None, ["gad"], pupil, None, dict)  # type: ignore[arg-type]
    pupil.freeze_reference()
    assert pupil.reference is not None
    expected = {name: p.clone() for name, p in pupil.reference.named_parameters()}
    assert {p.dtype for p in expected.values()} == {torch.float32, torch.bfloat16}
    checkpoints._save_reference(3)
    in_fp32 = {name: p.detach() for name, p in pupil.model.named_parameters()}
    for _ in range(2):
        for p in pupil.reference.parameters():
            p.zero_()
        checkpoints.restore_reference(pupil.reference)
        for name, p in pupil.reference.named_parameters():
            assert p.dtype == expected[name].dtype and torch.equal(p, expected[name])
        store.save(folder.reference, 4, {"reference": in_fp32}, {}, keep=1)


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_on_them(folder: RunFolder, monkeypatch) -> None:
    """A power cut in between leaves more than the checkpoint needs, never less."""
    settings = StudentSettings()
    pupil = Student(tiny_model(tied=False), settings, AlgorithmSettings(), temperature=1.0, micro_batch_tokens=64)
    memory = Colocation(torch.device("cpu"), MemorySettings(offload="none"), folder.path, shared=True)
    loader = Loader(groups(3), 2, 0)
    checkpoints = Checkpoints(folder, memory, loader, ["gad"], pupil, None, lambda: DATA)
    done: list[str] = []
    for module in (tracking, run_folder_module):
        monkeypatch.setattr(module, "sync", lambda path: done.append(f"sync {path.name}"))
    save = store.save
    monkeypatch.setattr(store, "save", lambda *given, **more: done.append("save") or save(*given, **more))
    path = checkpoints.save(Progress(step=6), keep=9)
    assert done[-1] == "save" and set(done[:-1]) == {"sync metrics.jsonl", "sync samples.jsonl", "sync run"}
    assert check(Config(), DATA, folder, store.load(path)) == []
    swap(folder.path / "samples.jsonl", '{"step": 6}', '{"step": 6, "reward": 9}')
    with pytest.raises(UserError, match="samples.jsonl has been changed in its first 6 rows"):
        check(Config(), DATA, folder, store.load(path))
