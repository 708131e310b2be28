"""Installs a stack into the environment of the Python that runs this: python requirements/install.py [cpu|cuda]

The packages of cpu.lock (default) or cuda.lock, without dependencies: the locks leave out what would break others, such
as a torchvision that does not fit torch's CPU build. PyPI has torch's CUDA build for Linux, and its CPU build for macOS
alone. Where pip finds the stack's build of torch, pip installs everything; else uv does, which knows where PyTorch
keeps its builds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple


class Stack(NamedTuple):
    """backend: of torch, as uv calls it. disk, download: what the environment takes and what is fetched for it, in GB.
    minutes: that it takes with two cores and 30 MB/s. cuda: whether its torch must be a build for CUDA.
    """

    lock: Path
    backend: str
    disk: float
    download: float
    minutes: int
    cuda: bool


HERE = Path(__file__).parent
# Those of the CPU stack were measured on Linux; the download of the CUDA stack is the sum of its wheels.
STACKS = {
    "cpu": Stack(HERE / "cpu.lock", "cpu", 3.3, 1.1, 4, False),
    "cuda": Stack(HERE / "cuda.lock", "cu130", 10.5, 4.1, 8, True),
}
UV = "uv==0.13.9"


def main(arguments: list[str]) -> int:
    """Returns 0, or 2 after a sentence that says what the user can do."""
    name = arguments[0] if arguments else "cpu"
    if name not in STACKS or len(arguments) > 1:
        return _fail(f"requirements/install.py takes one of {', '.join(STACKS)}, not {' '.join(arguments)!r}")
    stack = STACKS[name]
    if stack.cuda and sys.platform != "linux":
        return _fail("the CUDA stack is for Linux: set GADCORE_STACK=cpu")
    free = shutil.disk_usage(sys.prefix).free / 1e9
    size = f"{stack.disk} GB of disk, up to {stack.download} GB to download, about {stack.minutes} minutes"
    print(f"gadcore: installing the packages of {stack.lock.name} into {sys.prefix}: {size}", flush=True)
    # What is downloaded lies beside what is installed, for a while.
    if free < stack.disk + stack.download and _torch() is None:
        return _fail(f"only {free:.1f} GB are free there: make room, or choose another place by VENV=/path")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as torch:
        torch.write("\n".join(_pins(stack.lock, "torch==")))
        torch.flush()
        found = _pip("-r", torch.name, quiet=True)
    if found.returncode == 0 and _fits(stack):
        lock = f"requirements/{stack.lock.name}"
        return 0 if _pip("-r", str(stack.lock)).returncode == 0 else _fail(f"pip could not install {lock}")
    why = _last(found.stderr) if found.returncode else f"it finds {_torch()}"
    build = "CUDA" if stack.cuda else "CPU"
    print(f"gadcore: pip finds no {build} build of torch ({why}): uv looks where PyTorch keeps it", flush=True)
    return _by_uv(stack)


def _by_uv(stack: Stack) -> int:
    if _pip(UV).returncode:
        return _fail(f"pip cannot install {UV} either: is a package index reachable?")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, "--no-deps"]
    # The same version of another build would be taken for what is asked for.
    again = ["--reinstall-package", "torch"] if _torch() is not None and not _fits(stack) else []
    done = _run([*command, *again, f"--torch-backend={stack.backend}", "-r", str(stack.lock)])
    if done.returncode == 0 and _fits(stack):
        return 0
    build = "CUDA" if stack.cuda else "CPU"
    return _fail(
        f"neither pip nor uv could install requirements/{stack.lock.name}: let PIP_FIND_LINKS name a folder, or "
        f"PIP_EXTRA_INDEX_URL an index, that has torch's {build} build"
    )


def _pins(lock: Path, name: str) -> list[str]:
    return [line for line in lock.read_text().splitlines() if line.startswith(name) and not line.startswith("#")]


def _torch() -> str | None:
    """The torch that is installed and the CUDA version that it is built for, as its own file says; None without one."""
    file = Path(sysconfig.get_paths()["platlib"]) / "torch" / "version.py"
    if not file.is_file():
        return None
    found = dict(re.findall(r"^(__version__|cuda)\b[^=]*= *(.*)$", file.read_text(), re.MULTILINE))
    return f"torch {found['__version__']}, CUDA {found.get('cuda', 'None')}".replace("'", "")


def _fits(stack: Stack) -> bool:
    """Whether the torch that is installed now is the stack's kind of build."""
    torch = _torch()
    return torch is not None and (not torch.endswith("CUDA None")) == stack.cuda


def _pip(*arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *arguments], quiet=quiet)


def _run(command: list[str], *, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    print("+", *command, flush=True)
    return subprocess.run(command, text=True, stderr=subprocess.PIPE if quiet else None)


def _last(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("ERROR")] or text.strip().splitlines() or [""]
    return errors[-1].removeprefix("ERROR: ")


def _fail(reason: str) -> int:
    print(f"gadcore: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
