"""Tests in a process where Triton's kernels run in its interpreter; in any other process they are skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class NotInterpreted(pytest.File):
    """Stands for a test file in a process where its kernels would be compiled for a GPU."""

    def collect(self) -> Any:
        pytest.skip("needs a process of its own, started with TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1")


def only_interpreted(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """What pytest_pycollect_makemodule() of such a folder's conftest.py returns."""
    return None if INTERPRETED else NotInterpreted.from_parent(parent, path=module_path)
