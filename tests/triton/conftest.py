"""What is particular to the Triton kernels, run by Triton's interpreter on CPU tensors, in a process of its own:

    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/triton

In any other process everything here is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.importable import make_bench_importable
from tests.support.interpreted import INTERPRETED, only_interpreted


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return only_interpreted(module_path, parent)


make_bench_importable()

if INTERPRETED:
    # First of all: it refuses kernels that were defined before it.
    import torch

    import bench.offline.interpreter as interpreter
    from bench.offline.guard import Guard
    from bench.offline.guard import guarded as guard_launches

    @pytest.fixture(autouse=True)
    def uninitialised_memory_is_nan() -> Iterator[None]:
        """torch.empty gives NaN (integers: the largest), so that an element that no program stored shows."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(before)

    @pytest.fixture
    def guarded() -> Iterator[Guard]:
        """Raises on an out-of-bounds access at once, and at the end of the test on races and doubled stores."""
        with guard_launches() as guard:
            yield guard

    @pytest.fixture
    def shuffled_programs() -> Callable[[int], AbstractContextManager[None]]:
        """`with shuffled_programs(seed):` runs the programs of every launch in the block in a random order."""
        return interpreter.shuffled
