"""The opponents compute what we compute, on the CPU and as the suite gpu calls them."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as command
from bench import peak, record
from bench.kernels import cases
from bench.kernels.cases import COMPILED, CUT, LIGER, NAIVE, TRL, Size
from bench.kernels.compare import Setup, line, measure
from bench.runner import Rounds, wall

ONCE = Rounds(1, 1, 0.0)
REFERENCE = Setup("kernels", "reference", torch.float32, "cpu", 1, wall, peak.extra_peak)


def assert_all_pass(size: Size, setup: Setup = REFERENCE) -> set[str]:
    seen = set()
    for each in cases.head_cases(size, setup):
        for measured in measure(each, setup):
            assert measured.gate == "pass", line(measured)
            assert measured.theirs.error or "product" in measured.opponent
            seen.add(measured.opponent)
    return seen


def test_naive_and_trl_compute_what_we_compute() -> None:
    pytest.importorskip("trl")
    size = Size(64, 32, 500, frozenset({NAIVE, TRL}), ONCE, ONCE, length=8)
    assert assert_all_pass(size) == {"three bare products", "one bare product", "naive torch", "TRL"}


@pytest.mark.slow
def test_compiled_opponents_compute_what_we_compute() -> None:
    for package in ("cut_cross_entropy", "liger_kernel"):
        pytest.importorskip(package)
    # Two chunks of the compiled ones.
    size = Size(1024, 16, 64, frozenset({COMPILED, CUT, LIGER}), ONCE, ONCE, length=64, logprob_backward=True)
    assert assert_all_pass(size) >= {"torch.compile, chunks of 512", "cut-cross-entropy", "Liger"}


def test_gpu_suite_says_that_it_was_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(record, "write", lambda path, rows: pytest.fail(f"wrote {path}"))
    assert command.main(["gpu"]) == 0
    assert capsys.readouterr().out.startswith("skipped: no CUDA device")
