"""Machines with an NVIDIA driver, and one whose packages are others, for code that asks NVML, torch and metadata."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace

import pytest

from gadcore.doctor import machine, packages
from gadcore.doctor.machine import Torch

H100 = ("NVIDIA H100 80GB HBM3", 85_520_809_984, (9, 0))


def nvml(
    monkeypatch: pytest.MonkeyPatch,
    *,
    driver: str = "580.65.06",
    cuda: int = 13000,
    gpus: tuple = (H100,),
    fails: str = "",
) -> ModuleType:
    """Puts a pynvml in place that answers for these GPUs. fails: the name of an NVMLError that nvmlInit raises."""
    fake = ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    for name in ("LibraryNotFound", "NotSupported", "LibRmVersionMismatch"):
        setattr(fake, f"NVMLError_{name}", type(f"NVMLError_{name}", (fake.NVMLError,), {}))  # type: ignore[attr-defined]

    def init() -> None:
        if fails:
            raise getattr(fake, f"NVMLError_{fails}")(fails)

    def memory(gpu: tuple) -> SimpleNamespace:
        if gpu[1] is None:
            raise fake.NVMLError_NotSupported  # type: ignore[attr-defined]
        return SimpleNamespace(total=gpu[1], free=gpu[1] - 2**30)

    answers = {
        "nvmlInit": init,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: gpus[index],
        "nvmlDeviceGetName": lambda gpu: gpu[0],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu[2],
    }
    for name, answer in answers.items():
        setattr(fake, name, answer)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


# As requirements/cuda.lock has them.
CUDA_STACK = {
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "vllm": "0.32.0",
    "triton": "3.7.1",
    "liger-kernel": "0.8.5",
}


def environment(monkeypatch: pytest.MonkeyPatch, installed: Mapping[str, str], torch: Torch) -> None:
    """The installed packages, by name their versions, and what torch says of itself."""
    monkeypatch.setattr(packages, "installed", installed.get)
    monkeypatch.setattr(machine, "ask_torch", lambda: torch)
