"""Settings that hold for every test."""

import os

import pytest

# Before torch is imported: spinning threads make a small test on a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without what only makes a CPU faster, tests of that have nothing to test."""
    from gadcore.kernels.cpu import native

    reason = native.why_missing("cpu_linear_logprob")
    for item in items:
        if reason is not None and item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip(reason=reason))
