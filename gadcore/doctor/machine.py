"""The device as driver and torch see it, what was compiled for it, and the room that a run has."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from gadcore.config.driver import (
    Driver,
    DriverUnknown,
    hidden_on_purpose,
    read_driver,
    why_unseen,
)
from gadcore.doctor.check import Check
from gadcore.doctor.packages import ROOT, Stack, mending

_MODULE = Path("/proc/driver/nvidia")
_SHM = Path("/dev/shm")
_LEAST_SHM, _LEAST_DISK, _LEAST_HOST = 1e9, 10e9, 4e9


class Torch(NamedTuple):
    """What the installed torch says. cuda: the version that it is built for; None for a CPU build. devices: names."""

    version: str
    cuda: str | None
    devices: tuple[str, ...]


def ask_torch() -> Torch:
    """Loads torch. Raises ImportError where it cannot be."""
    import torch

    with warnings.catch_warnings():
        # An old driver is told in a row of its own.
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = tuple(torch.cuda.get_device_name(i) for i in range(count))
    return Torch(torch.__version__, torch.version.cuda, names)


def stack_of(driver: Driver | None) -> Stack:
    """The stack that this machine asks for: "cuda" where there are GPUs that nobody has hidden."""
    return "cuda" if driver is not None and driver.gpus and not hidden_on_purpose() else "cpu"


def driver_checks() -> tuple[Driver | None, list[Check]]:
    """The driver, and the rows of it and of its GPUs."""
    try:
        driver = read_driver()
    except DriverUnknown as error:
        # Its kernel module is there: the machine has a GPU.
        broken = _MODULE.exists()
        mend = (
            f"{sys.executable} -m pip install nvidia-ml-py" if "nvidia-ml-py" in str(error) else "nvidia-smi says more"
        )
        return None, [Check("driver", f"cannot be asked ({error})", "wrong" if broken else "note", mend)]
    if driver is None:
        return None, [Check("driver", "none: no NVIDIA GPU")]
    hidden = "; CUDA_VISIBLE_DEVICES leaves out all of them" if hidden_on_purpose() else ""
    rows = [Check("driver", str(driver))]
    if not driver.gpus:
        rows.append(Check("GPUs", "none"))
    for index, gpu in enumerate(driver.gpus):
        rows.append(Check(f"GPU {index}", f"{gpu}{hidden}"))
    return driver, rows


def torch_check(driver: Driver | None, stack: Stack) -> tuple[Torch | None, Check]:
    """Whether torch sees what the driver has."""
    try:
        torch = ask_torch()
    except (ImportError, OSError) as error:
        return None, Check("torch's device", f"torch cannot be loaded ({error})", "wrong", mending(stack))
    build = f"CUDA {torch.cuda}" if torch.cuda else "no CUDA"
    if torch.devices:
        return torch, Check(
            "torch's device", f"built for {build}, sees {len(torch.devices)}: {', '.join(torch.devices)}"
        )
    if driver is None or stack == "cpu":
        return torch, Check("torch's device", f"built for {build}, computes on the CPU")
    reason, _, mend = why_unseen(driver, torch.version, torch.cuda).rpartition(": ")
    return torch, Check("torch's device", reason, "wrong", mending(stack) if torch.cuda is None else mend)


def native_checks(stack: Stack) -> list[Check]:
    """What was compiled from csrc."""
    from gadcore.kernels.cpu import native as on_cpu
    from gadcore.kernels.cuda import native as on_cuda

    build = f"{sys.executable} -m pip install --no-deps --no-build-isolation -e {ROOT}"
    reason = on_cpu.why_missing("cpu_linear_logprob")
    rows = [Check("native CPU ops", "built") if reason is None else Check("native CPU ops", reason, "note", build)]
    if stack == "cuda":
        reason = on_cuda.why_missing("cast_copy")
        mend = f"{sys.executable} {ROOT / 'csrc' / 'cuda' / 'build.py'}"
        rows.append(Check("_cuda.so", "built") if reason is None else Check("_cuda.so", reason, "note", mend))
    return rows


def room_checks(stack: Stack, runs: Path, cache: Path) -> list[Check]:
    """Host memory, what of it may be locked, /dev/shm, and the disks of runs and of the cache."""
    import psutil

    from gadcore.memory.resident import memory_limit

    memory = psutil.virtual_memory()
    free, limit = min(memory.available, memory_limit()), memory_limit()
    short = free < _LEAST_HOST
    rows = [
        Check(
            "host memory",
            f"{free / 1e9:.0f} of {limit / 1e9:.0f} GB free",
            "note" if short else "ok",
            "end what else runs" * short,
        ),
        Check("page-locked", f"ulimit -l is {_locked()}; what CUDA locks is not counted by it"),
    ]
    if _SHM.is_dir():
        size = shutil.disk_usage(_SHM).total
        small = stack == "cuda" and size < _LEAST_SHM
        mend = "docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm" if small else ""
        rows.append(Check("/dev/shm", f"{size / 1e9:.1f} GB", "note" if small else "ok", mend))
    for name, folder in (("disk of runs", runs), ("disk of the cache", cache)):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        size = shutil.disk_usage(there).free
        little = size < _LEAST_DISK
        mend = "make room, or choose another place (run.dir, GADCORE_CACHE)" if little else ""
        rows.append(Check(name, f"{size / 1e9:.0f} GB free ({folder})", "note" if little else "ok", mend))
    return rows


def _locked() -> str:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"


def python_check() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    mend = "make setup PY=/path/to/python3.11"
    return Check("Python", f"{version} ({os.uname().machine})") if fits else Check("Python", version, "wrong", mend)
