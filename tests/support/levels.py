"""The CPU kernels at an instruction set of a test's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

LEVELS = ("scalar", "baseline", "avx2", "wide", "avx512")


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Skips the test where this CPU does not have it."""
    set_level = torch.ops.gadcore._cpu_level
    try:
        set_level(level)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    try:
        yield
    finally:
        set_level("")
