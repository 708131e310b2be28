"""Installs the packages of cpu.lock into the environment of the Python that runs this: python requirements/install.py

PyPI has torch's CPU build for macOS alone. Where pip's own configuration names a place that has it for Linux, pip
installs everything; else uv does, which knows where PyTorch keeps its builds. Without dependencies: the lock leaves out
what does not fit torch's CPU build and breaks transformers when it is there, such as PyPI's torchvision.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).with_name("cpu.lock")
UV = "uv==0.13.9"
# Measured on Linux: what the environment takes, and what is downloaded for it, in GB.
ENVIRONMENT, DOWNLOAD = 3.3, 1.1


def main() -> int:
    """Returns 0, or 2 after a sentence that says what the user can do."""
    free = shutil.disk_usage(sys.prefix).free / 1e9
    size = f"{ENVIRONMENT} GB of disk, up to {DOWNLOAD} GB to download, about four minutes"
    print(f"gadcore: installing the packages of {LOCK.name} into {sys.prefix}: {size}", flush=True)
    if free < ENVIRONMENT + DOWNLOAD and not _installed("torch"):
        return _fail(f"only {free:.1f} GB are free there: make room, or choose another place by VENV=/path")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as torch:
        torch.write("\n".join(_pins("torch==")))
        torch.flush()
        found = _pip("-r", torch.name, quiet=True)
    if found.returncode == 0:
        return 0 if _pip("-r", str(LOCK)).returncode == 0 else _fail("pip could not install requirements/cpu.lock")
    print(
        f"gadcore: pip finds no CPU build of torch ({_last(found.stderr)}): uv looks where PyTorch keeps it", flush=True
    )
    if _pip(UV).returncode:
        return _fail(f"pip cannot install {UV} either: is a package index reachable?")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, "--no-deps"]
    if _run([*command, "--torch-backend=cpu", "-r", str(LOCK)]).returncode:
        return _fail(
            "neither pip nor uv could install requirements/cpu.lock: let PIP_FIND_LINKS name a folder, or "
            "PIP_EXTRA_INDEX_URL an index, that has torch's CPU build"
        )
    return 0


def _pins(name: str) -> list[str]:
    return [line for line in LOCK.read_text().splitlines() if line.startswith(name) and not line.startswith("#")]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


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
    sys.exit(main())
