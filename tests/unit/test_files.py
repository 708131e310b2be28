"""Files and folders are whole or not there; a checksum is what others compute for the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from gadcore import files
from gadcore.files import (
    checksum,
    clear_temporaries,
    free_name,
    replace_link,
    temporary,
    whole_folder,
    write_jsonl,
    write_whole,
)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    write_whole(path, "käse\n")
    assert path.read_bytes() == b"k\xc3\xa4se\n"
    write_whole(path, b"\x00\r\n", synced=True)
    assert path.read_bytes() == b"\x00\r\n" and os.listdir(path.parent) == ["file"]


def test_half_a_surrogate_pair_is_written_as_asked(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    write_whole(tmp_path / "file", "\ud800", errors="backslashreplace")
    assert (tmp_path / "file").read_text() == "\\ud800"


@pytest.mark.parametrize("synced", [True, False])
def test_synced_content_is_on_the_disk_before_the_old_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    path, seen = tmp_path / "file", list[Any]()
    path.write_text("old")
    monkeypatch.setattr(
        files, "sync", lambda file: seen.append((file.is_file() and file.read_text(), path.read_text()))
    )
    write_whole(path, "new", synced=synced)
    # The file, and then its new name in the folder.
    assert seen == [("new", "old"), (False, "new")] * synced and path.read_text() == "new"


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_is_there_when_it_is_filled(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "made" / "folder"
    with whole_folder(path, shared=shared) as work:
        (work / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1" and os.listdir(path.parent) == ["folder"]


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, shared: bool) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "folder", shared=shared) as work:
        (work / "a").write_text("1")
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    for name in ("folder", "other"):
        left = temporary(tmp_path / name)
        left.mkdir()
        (left / "old").touch()
    with whole_folder(tmp_path / "folder") as work:
        (work / "new").touch()
    assert os.listdir(tmp_path / "folder") == ["new"]
    assert [name.startswith(".gadcore-other-") for name in sorted(os.listdir(tmp_path))] == [True, False]
    clear_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["folder"]


def test_what_others_made_is_never_touched(tmp_path: Path) -> None:
    """Whatever is named as a temporary file or folder could be, the link onto another file above all."""
    (tmp_path / "precious").write_text("mine")
    for name in ("x.partial", ".tmp-x", ".gadcore-x", ".gadcore-x-1", ".x-1"):
        (tmp_path / name).symlink_to("precious")
    for name in ("y.partial", ".tmp-y", ".gadcore-y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    write_whole(tmp_path / "x", "new")
    replace_link(tmp_path / "link", tmp_path / "x")
    with whole_folder(tmp_path / "y") as work:
        (work / "a").touch()
    clear_temporaries(tmp_path)
    assert before == {path: path.read_text() for path in before} and (tmp_path / "x.partial").is_symlink()


def test_a_folder_takes_the_place_of_another_only_where_it_may(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with whole_folder(path, replace=True) as work:
            (work / name).touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["new"]
    with pytest.raises(OSError), whole_folder(path) as work:
        pass
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["new"]


def test_two_write_one_file_and_one_of_them_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins, and ends, while the first is about to move its file into place."""
    path, moved = tmp_path / "file", os.replace

    def late(partial: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", moved)
        write_whole(path, "second")
        moved(partial, target)

    monkeypatch.setattr(os, "replace", late)
    write_whole(path, "first")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_full_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(file: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError) as error:
        write_whole(path, "new", synced=True)
    assert error.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_of_two_that_share_a_folder_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(OSError), whole_folder(path, shared=True) as late:
        (late / "late").touch()
        with whole_folder(path, shared=True) as early:
            (early / "early").touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["early"]


def test_rows_keep_every_text(tmp_path: Path) -> None:
    rows = [{"text": "ä \u2028 \ud800", "number": 0.5}, {}]
    write_jsonl(tmp_path / "rows", rows)
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().split("\n")[:-1]] == rows


def test_a_link_moves_on_and_is_relative(tmp_path: Path) -> None:
    link = tmp_path / "runs" / "latest"
    for name in ("one", "two"):
        replace_link(link, tmp_path / "runs" / name)
        assert os.readlink(link) == name
    assert os.listdir(link.parent) == ["latest"]


def test_a_free_name_counts_on(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = free_name(tmp_path / "run")
        path.mkdir()
        names.append(path.name)
    assert names == ["run", "run-2", "run-3"]
    (tmp_path / "config.toml").symlink_to("nowhere")
    assert free_name(tmp_path / "config", ".toml").name == "config-2.toml"


def test_checksums(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert checksum(tmp_path / "file") == xxhash.xxh3_128(data).hexdigest()
    assert checksum(tmp_path / "file", "sha256") == hashlib.sha256(data).hexdigest()
