from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_find_spec_of_kernels_never_points_into_this_repository() -> None:
    """-I: what the installed package puts on the path, without the current directory."""
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); print(s and (s.origin, s.submodule_search_locations))"
    )
    assert str(ROOT) not in _run("-I", "-c", code, cwd=ROOT)


def test_kernels_here_is_no_package_even_from_the_repository_root() -> None:
    """With the root on the path Python sees a bare folder; the Hugging Face package still wins over it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    if importlib.util.find_spec("kernels") and _installed("kernels"):
        pytest.skip("the Hugging Face package kernels is installed")
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert _run("-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).split() == ["False"]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without native code, built from a copy of the sources and unpacked."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for folder in ("gadcore", "kernels", "configs", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, source)
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), ".")
    _run(*build, cwd=source, GADCORE_NO_NATIVE="1")
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_one_top_level_package(unpacked_wheel: Path) -> None:
    assert sorted(path.name.split("-")[0] for path in unpacked_wheel.iterdir()) == ["gadcore", "gadcore"]


def test_wheel_holds_kernels_presets_and_assets(unpacked_wheel: Path) -> None:
    held = {path.relative_to(unpacked_wheel) for path in unpacked_wheel.rglob("*") if path.is_file()}
    for folder, patterns in {
        "kernels": ["*.py"],
        "configs": ["*.toml"],
        "gadcore": ["*.py", "*.css", "*.html", "*.js", "*.json", "*.jsonl", "*.md"],
    }.items():
        for pattern in patterns:
            files = [
                path for path in (ROOT / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts
            ]
            assert files
            inside = Path("gadcore") if not folder.startswith("gadcore") else Path()
            missing = {inside / path.relative_to(ROOT) for path in files} - held
            assert not missing


def test_wheel_imports_from_where_it_lies(unpacked_wheel: Path, tmp_path: Path) -> None:
    code = "import gadcore.kernels.layout as k, gadcore.config.settings as c; print(k.__file__); print(c.__file__)"
    for line in _run("-c", code, cwd=tmp_path, PYTHONPATH=str(unpacked_wheel)).splitlines():
        assert Path(line).is_relative_to(unpacked_wheel / "gadcore")
