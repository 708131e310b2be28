"""The Dockerfile: it does what the Makefile says, with files that are there."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """(name, what follows) of every instruction, its lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def test_every_step_is_a_target_of_the_makefile() -> None:
    system, *steps = of("RUN")
    assert system.startswith("apt-get update")
    assert steps == ["make packages", "make setup"]
    (last,) = of("CMD")
    assert all(step.split()[1] in TARGETS for step in [*steps, " ".join(json.loads(last))])
    # What the head of the file names as well.
    comments = " ".join(re.findall(r"^# (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert all(target in TARGETS for target in re.findall(r"make ([a-z-]+)", comments))


def test_the_image_has_the_cuda_that_the_lock_is_for_and_a_python_that_make_takes() -> None:
    (image,) = of("FROM")
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-devel-ubuntu24\.04", image)
    assert "GADCORE_STACK=cuda" in of("ENV")[0] and "PY=python3.12" in of("ENV")[0]
    assert {"python3.12", "python3.12-venv", "python3.12-dev", "g++", "make"} <= set(of("RUN")[0].split())


def test_what_is_copied_is_there_is_not_ignored_and_is_enough() -> None:
    copied = [source for rest in of("COPY") for source in rest.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern.removeprefix("**/")) for pattern in ignored), source
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    assert top - set(copied) <= {".ci", ".gitignore", ".dockerignore", "Dockerfile"}


def test_packages_need_no_file_that_is_copied_after_them() -> None:
    """Else the layer that downloads them could not be made."""
    before = [rest for name, rest in instructions()[: instructions().index(("RUN", "make packages"))] if name == "COPY"]
    command = ["make", "-n", "packages", "GADCORE_STACK=cuda", "VENV=/nowhere"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert before == ["Makefile ./", "requirements requirements"]
    assert "requirements/install.py cuda" in lines and "pip install" not in lines and "csrc" not in lines


def test_what_a_machine_leaves_behind_is_not_sent() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "build", "**/__pycache__", "**/*.so"} <= set(ignored)
