"""Figures of this machine that `plan --calibrate` has measured, kept in machine.json by device and threads."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from gadcore.config.device import cpu_name
from gadcore.files import write_whole
from gadcore.models.loading import cache_dir


def path() -> Path:
    """Where the figures are kept."""
    return cache_dir() / "machine.json"


def device_name(kind: str | None = None) -> str:
    """The name of the GPU or the CPU. kind: "cuda" or "cpu"; default the GPU where there is one."""
    if kind == "cuda" or (kind is None and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    return cpu_name()


def read(threads: int, kind: str | None = None) -> tuple[dict[str, float], str]:
    """(figures, date) of this machine's calibration for so many threads; ({}, "") where there is none.

    kind: as device_name().
    """
    try:
        kept = json.loads(path().read_text())
        entry = kept[device_name(kind)][str(threads)]
        return {name: float(value) for name, value in entry["figures"].items()}, str(entry["date"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, ""


def keep(figures: dict[str, float], threads: int) -> Path:
    """Writes figures beside those of other thread counts; returns the file."""
    try:
        kept = json.loads(path().read_text())
    except (OSError, ValueError):
        kept = {}
    kept.setdefault(device_name(), {})[str(threads)] = {"date": time.strftime("%Y-%m-%d"), "figures": figures}
    write_whole(path(), json.dumps(kept, indent=1) + "\n")
    return path()
