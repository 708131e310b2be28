"""The engine on a stand-in for a GPU (bench/offline/cuda_standin): every branch that CUDA takes, on a CPU.

    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/rehearsal

In any other process everything here is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.importable import make_bench_importable
from tests.support.interpreted import INTERPRETED, only_interpreted


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return only_interpreted(module_path, parent)


make_bench_importable()

if INTERPRETED:
    # First of all: it refuses kernels that were defined before it.
    import bench.offline.interpreter  # noqa: F401
