"""The comparisons of the suite `kernels` on a CUDA device, timed with CUDA events: `python -m bench gpu`.

Where there is no CUDA device nothing is measured, which is said, and is no failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.kernels import cases
from bench.kernels.cases import COMPILED, CUT, LIGER, NAIVE, TRL, Size
from bench.kernels.compare import KernelCase, Setup, line, measure
from bench.runner import Rounds

SKIPPED = "skipped: no CUDA device"

# The head of Qwen2.5-7B, at the token counts of a small and of a full micro-batch.
WIDTH, VOCABULARY, TOKENS = 3584, 151936, (4096, 12288)


def run(quick: bool) -> list[dict[str, Any]]:
    """All comparisons in bfloat16, [] where there is no CUDA device."""
    if not torch.cuda.is_available():
        print(SKIPPED)
        return []
    setup = Setup("gpu", "triton", torch.bfloat16, "cuda", torch.get_num_threads(), event_clock, extra_peak)
    device = torch.cuda.get_device_properties(0)
    facts = record.machine() | {"gpu": device.name, "gpu_memory_gib": round(device.total_memory / 2**30, 1)}
    rows = []
    for case in all_cases(setup, quick):
        for result in measure(case, setup):
            record.say(line(result))
            rows.append(record.as_row(result) | {"machine": facts})
    return rows


def all_cases(setup: Setup, quick: bool) -> Iterator[KernelCase]:
    """Every case of this suite; with `quick` on small shapes, beside plain PyTorch alone."""
    rounds = Rounds(2, 2, 0.0) if quick else Rounds(20, 100, 5.0)
    if quick:
        yield from cases.head_cases(Size(64, 32, 500, frozenset({NAIVE}), rounds, rounds, length=8), setup)
    else:
        for tokens in TOKENS:
            opponents = frozenset({NAIVE, COMPILED, CUT, TRL, LIGER})
            yield from cases.head_cases(Size(tokens, WIDTH, VOCABULARY, opponents, rounds, rounds), setup)
    yield cases.score_case(*((2, 4, 3, 64) if quick else (256, 8, 64, WIDTH)), rounds, setup)
    yield cases.ratio_case(256 if quick else 2**20, rounds, setup)


def event_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds a call between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def extra_peak(call: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], int | None]:
    """The outputs of a call, and the peak of the memory that the caching allocator handed out during it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return outputs, torch.cuda.max_memory_allocated() - before
