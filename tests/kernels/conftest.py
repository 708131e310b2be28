"""Prints what the grid found, and with GADCORE_GRID_JSON=FILE keeps it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.importable import make_bench_importable
from tests.support.kernel_grid import RECORD

if os.environ.get("TRITON_INTERPRET") == "1":
    # Before any kernel is defined: it mends what the interpreter computes wrongly.
    make_bench_importable()
    import bench.offline.interpreter  # noqa: F401

_started = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = RECORD.rows()
    if not rows:
        return
    terminalreporter.section("kernels: largest errors against float64")
    for row in rows:
        gradient = row["gradient_error"]
        terminalreporter.write_line(
            f"{row['op']:18s} {row['impl']:10s} {row['dtype']:9s} {row['tests']:5d} cases   "
            f"forward {row['forward_error']:.1e}   gradients {'-' if gradient is None else f'{gradient:.1e}'}"
        )
    if path := os.environ.get("GADCORE_GRID_JSON"):
        RECORD.write(Path(path), time.monotonic() - _started)
