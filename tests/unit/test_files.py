"""Files and folders are whole or not there; a checksum is what others compute for the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import xxhash

from gadcore import files
from gadcore.files import TEMPORARY, checksum, free_name, replace_link, whole_folder, write_jsonl, write_whole


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
    path, seen = tmp_path / "file", []
    path.write_text("old")
    monkeypatch.setattr(files, "sync", lambda partial: seen.append((partial.read_text(), path.read_text())))
    write_whole(path, "new", synced=synced)
    assert seen == [("new", "old")] * synced and path.read_text() == "new"


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
    (tmp_path / f"{TEMPORARY}folder").mkdir()
    (tmp_path / f"{TEMPORARY}folder" / "old").touch()
    with whole_folder(tmp_path / "folder") as work:
        (work / "new").touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]


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


def test_checksums(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert checksum(tmp_path / "file") == xxhash.xxh3_128(data).hexdigest()
    assert checksum(tmp_path / "file", "sha256") == hashlib.sha256(data).hexdigest()
