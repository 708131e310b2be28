"""docs/guide/add-an-op.md: the op that it adds works as it stands there, and touches as many files as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide" / "add-an-op.md"


def blocks() -> list[tuple[str, str]]:
    """(the path in the heading above, the code) of every block of the guide."""
    found = []
    for part in re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        path = part.split("`")[1]
        found += [(path, code) for code in re.findall(r"^```python\n(.*?)^```$", part, flags=re.M | re.S)]
    return found


def insert(path: Path, code: str) -> None:
    """An entry goes to the start of the file's dictionary, a function above its class."""
    text = path.read_text(encoding="utf-8")
    if code.startswith("def "):
        at = text.index("class Grid(")
        code += "\n\n"
    else:
        opening = "\nOPS = {\n" if path.name == "ops.py" else "\nGRIDS = {\n"
        at = text.index(opening) + len(opening)
    path.write_text(text[:at] + code + text[at:], encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what ops and their tests are made of, with the op of the guide."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("gadcore", "kernels", "csrc", "bench", "docs/guide", "tests/support", "tests/kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, code in blocks():
        target = root / path
        if target.exists():
            insert(target, code)
        else:
            target.write_text(code, encoding="utf-8")
    return root


def run(tree: Path, *arguments: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(tree), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_guide_counts_the_files_that_it_touches() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w/<>.]+)` \|", text, flags=re.M)
    assert [path.replace("<op>", "squared_relu") for path in table] == list(dict.fromkeys(path for path, _ in blocks()))
    assert len(table) == 4 and "touches four files" in text


@pytest.mark.slow
def test_its_reference_is_held_against_float64_and_the_table_is_whole(tree: Path) -> None:
    tests = ["tests/kernels/test_ops.py", "tests/kernels/test_grid.py"]
    out = run(tree, "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "test_ops or squared_relu")
    assert re.search(r"squared_relu\s+reference\s+float64\s+4 cases", out)


@pytest.mark.slow
def test_its_kernels_are_held_against_float64_by_the_interpreter(tree: Path) -> None:
    pytest.importorskip("triton")
    tests = ["tests/kernels/test_grid.py", "-k", "squared_relu"]
    out = run(tree, "pytest", "-q", "-p", "no:cacheprovider", *tests, TRITON_INTERPRET="1")
    assert len(re.findall(r"squared_relu\s+triton\s+\w+\s+4 cases", out)) == 3


@pytest.mark.slow
def test_it_passes_ruff(tree: Path) -> None:
    run(tree, "ruff", "check", "--no-cache", "kernels", "tests/support")
    run(tree, "ruff", "format", "--no-cache", "--check", "kernels", "tests/support")
