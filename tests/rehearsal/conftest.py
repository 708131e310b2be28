"""The engine on a stand-in for a GPU (bench/offline/cuda_standin): every branch that CUDA takes, on a CPU.

    make test-rehearsal

or TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/rehearsal; in any other process everything here is
skipped. With REHEARSAL_COVERAGE=FOLDER what was executed is written there (bench/offline/cuda_lines.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.importable import make_bench_importable
from tests.support.interpreted import INTERPRETED, only_interpreted


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return only_interpreted(module_path, parent)


ROOT = Path(__file__).resolve().parents[2]
FOLDER = os.environ.get("REHEARSAL_COVERAGE")


@contextmanager
def measured(folder: Path) -> Iterator[None]:
    """What runs inside is measured by coverage.py: in each process that runs tests, from before gadcore is imported."""
    from coverage import Coverage

    folder.mkdir(parents=True, exist_ok=True)
    coverage = Coverage(
        data_file=str(folder / ".coverage"),
        data_suffix=True,
        source=[str(ROOT / "gadcore"), str(ROOT / "kernels")],
        messages=False,
    )
    coverage.start()
    yield
    coverage.stop()
    coverage.save()


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER and INTERPRETED:
        # Tests may leave this process in another folder.
        measuring = measured(Path(FOLDER).resolve())
        measuring.__enter__()
        config.add_cleanup(lambda: measuring.__exit__(None, None, None))


make_bench_importable()

if INTERPRETED:
    # First of all: it refuses kernels that were defined before it.
    import bench.offline.interpreter  # noqa: F401
