from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcore.checkpoint import store
from gadcore.errors import UserError
from gadcore.files import temporary

TENSORS = {"student": {"w": torch.arange(1000.0)}, "discriminator": {"w": torch.ones(3)}}


def _save(root: Path, step: int, keep: int = 5) -> Path:
    return store.save(root, step, TENSORS, {"step": step}, keep)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "student.safetensors").unlink(), "student.safetensors is missing"),
        (lambda p: os.truncate(p / "student.safetensors", 100), "student.safetensors has 100 bytes"),
        (lambda p: _flip(p / "student.safetensors"), "student.safetensors is damaged"),
        (lambda p: _flip(p / "state.json"), "state.json is damaged"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda p: _edit_manifest(p, format=3), "format 3"),
        # That of shards says of how many processes they are.
        (lambda p: _edit_manifest(p, format=2), "manifest.json is damaged"),
        (lambda p: _edit_manifest(p, files={}), "manifest.json is damaged"),
        (lambda p: _edit_manifest(p, files={"state.json": 3}), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_the_way_out_is_said(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    paths = [_save(tmp_path, step) for step in (1, 2, 3, 4)]
    damage(paths[3])
    _flip(paths[2] / "discriminator.safetensors")
    with pytest.raises(UserError, match=message) as error:
        store.load(paths[3])
    # step 3 is damaged too: the newest sound one is step 2
    assert f"resume from {paths[1]} instead, by --resume step-000002" in str(error.value)
    assert store.latest(tmp_path) == paths[3]
    store.load(paths[1])


def test_no_older_checkpoint_is_said_and_newer_ones_are_not_offered(tmp_path: Path) -> None:
    first, _ = _save(tmp_path, 1), _save(tmp_path, 2)
    _flip(first / "state.json")
    with pytest.raises(UserError, match="no sound older checkpoint"):
        store.load(first)
    with pytest.raises(UserError, match="there is no checkpoint folder .*step-000007"):
        store.load(tmp_path / "step-000007")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


CALLS = {
    "save_file": (store, "save_file"),
    "write_bytes": (Path, "write_bytes"),
    "write_text": (Path, "write_text"),
    "chmod": (Path, "chmod"),
    "mkdir": (Path, "mkdir"),
    "rename": (Path, "rename"),
    "fsync": (os, "fsync"),
}


@pytest.mark.parametrize("call", CALLS)
def test_disk_full_at_any_write_leaves_earlier_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every single call fails once, the first, the second, .., until the save gets through."""
    owner, name = CALLS[call]
    original = getattr(owner, name)
    for step in (1, 2):
        _save(tmp_path, step)
    for failing_call in itertools.count(1):
        calls = itertools.count(1)

        def failing(*args: Any, calls: Any = calls, failing_call: int = failing_call, **kwargs: Any) -> Any:
            if next(calls) == failing_call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            # step 2 is saved again, so that putting a replacement in its place is among the calls that fail
            try:
                store.save(tmp_path, 2, TENSORS, {"step": 2, "again": True}, 5)
            except UserError as error:
                message = str(error)
            else:
                break
        assert "No space left on device" in message and "step-000002" in message
        assert not list(tmp_path.glob(".gadcore-*"))
        newest = store.load(tmp_path / "step-000002").state
        in_place = call in ("rename", "fsync") and newest == {"step": 2, "again": True}
        assert in_place or (newest == {"step": 2} and "cannot write checkpoint" in message)
        assert store.load(tmp_path / "step-000001").state == {"step": 1}
    assert failing_call > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert store.load(tmp_path / "step-000002").state == {"step": 2, "again": True}


def test_a_real_limit_of_the_file_system(tmp_path: Path) -> None:
    """The system refuses to write on in the midst of a tensor file."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from gadcore.checkpoint import store
from gadcore.errors import UserError
from gadcore.files import temporary
root = Path({str(tmp_path)!r})
store.save(root, 1, {{"m": {{"w": torch.ones(10)}}}}, {{}}, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(root, 2, {{"m": {{"w": torch.ones(1_000_000)}}}}, {{}}, 2)
except UserError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "step-000002: File too large" in output
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    store.load(tmp_path / "step-000001")


def test_old_checkpoints_that_cannot_be_deleted_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "_delete", refuse)
    with pytest.raises(UserError, match="step-000002 is saved, but .*Permission denied"):
        _save(tmp_path, 2, keep=1)
    store.load(tmp_path / "step-000002")


def test_leftovers_of_a_kill_are_cleaned(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    half = temporary(tmp_path / "step-000003")
    half.mkdir()
    (half / "student.safetensors").write_bytes(b"half")
    # killed between the two renames of a replacement
    (tmp_path / "step-000002").rename(tmp_path / "step-000002.replaced")
    newest = store.latest(tmp_path)
    assert newest == tmp_path / "step-000002.replaced"
    assert store.load(newest).step == 2
    _save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002", "step-000003"]


LOOP = """
import sys, torch
from pathlib import Path
from gadcore.checkpoint import store
root, start = Path(sys.argv[1]), int(sys.argv[2])
for step in range(start, start + 100000):
    for again in range(2):
        tensors = {"m": {"w": torch.full((30000,), float(step))}}
        store.save(root, step, tensors, {"step": step}, keep=2)
    if step == start:
        print("saving", flush=True)
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """After SIGKILL the newest checkpoint always loads, and never goes back behind one that was there before."""
    moments = random.Random(0)
    newest = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path), str(newest + 1)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        time.sleep(moments.uniform(0.01, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        path = store.latest(tmp_path)
        assert path is not None
        loaded = store.load(path)
        assert loaded.step > newest
        assert loaded.state == {"step": loaded.step}
        assert torch.equal(loaded.tensors["m"]["w"], torch.full((30000,), float(loaded.step)))
        newest = loaded.step
    store.save(tmp_path, newest + 1, {}, {}, keep=2)
    assert len(list(tmp_path.iterdir())) == 2
