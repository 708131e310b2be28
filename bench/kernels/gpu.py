"""The comparisons of the suite `kernels` on a CUDA device, an opponent at a time, timed with CUDA events."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import peak, record
from bench.gpu.place import Place, attempt, failed, installed, missing
from bench.kernels import cases
from bench.kernels.cases import COMPILED, CUT, LIGER, NAIVE, TRL, Size
from bench.kernels.compare import KernelCase, Setup, line, measure
from bench.runner import Rounds

# The head of Qwen2.5-7B, at the token counts of a small and of a full micro-batch.
WIDTH, VOCABULARY, TOKENS = 3584, 151936, (4096, 12288)
# The Python package of an opponent that need not be there.
PACKAGES = {CUT: "cut_cross_entropy", TRL: "trl", LIGER: "liger_kernel"}


def head(place: Place) -> Iterator[dict[str, Any]]:
    """The head of the smaller size beside its products and the opponents that need no long compilation, and the small
    ops."""
    rounds = Rounds(2, 2, 0.0) if place.tiny else Rounds(10, 40, 1.5)
    yield from _rows(place, TOKENS[:1], (NAIVE, CUT, TRL, LIGER), rounds)


def opponents(place: Place) -> Iterator[dict[str, Any]]:
    """Both sizes beside everyone, those that compile included, in more rounds."""
    rounds = Rounds(2, 2, 0.0) if place.tiny else Rounds(20, 100, 5.0)
    yield from _rows(place, TOKENS, (NAIVE, COMPILED, CUT, TRL, LIGER), rounds)


def setup_of(place: Place) -> Setup:
    if not place.on_gpu:
        return Setup("gpu", "auto", torch.float32, "cpu", torch.get_num_threads(), place.clock, peak.extra_peak)
    return Setup("gpu", "triton", torch.bfloat16, "cuda", torch.get_num_threads(), place.clock, extra_peak)


def _rows(place: Place, tokens: tuple[int, ...], names: tuple[str, ...], rounds: Rounds) -> Iterator[dict[str, Any]]:
    setup = setup_of(place)
    if not place.on_gpu:
        # On a CPU the others compile for minutes; those that are missing are told all the same.
        names = tuple(name for name in names if name == NAIVE or not installed(PACKAGES.get(name, "torch")))
    for count in (64,) if place.tiny else tokens:
        for name in ("", *names):
            if name in PACKAGES and not installed(PACKAGES[name]):
                yield missing(f"head of {count} tokens beside {name}", PACKAGES[name])
                continue
            yield from _head(count, name, rounds, setup, place)
    score = (2, 4, 3, 64) if place.tiny else (256, 8, 64, WIDTH)
    yield from _compared("bt_score", lambda: iter([cases.score_case(*score, rounds, setup)]), setup, place)
    length = 256 if place.tiny else 2**20
    yield from _compared("grpo_ratio_loss", lambda: iter([cases.ratio_case(length, rounds, setup)]), setup, place)


def _head(count: int, name: str, rounds: Rounds, setup: Setup, place: Place) -> Iterator[dict[str, Any]]:
    """linear_grpo_loss and linear_logprob beside one opponent; "": beside the products alone."""
    width, vocabulary, length = (32, 500, 8) if place.tiny else (WIDTH, VOCABULARY, 128)
    size = Size(count, width, vocabulary, frozenset({name} - {""}), rounds, rounds, length=length)

    def wanted() -> Iterator[KernelCase]:
        # The products come with every size.
        return (case for case in cases.head_cases(size, setup) if all(s.limit for s in case.opponents) == (not name))

    yield from _compared(f"head of {count} tokens beside {name or 'its products'}", wanted, setup, place)


def _compared(
    what: str, make: Callable[[], Iterator[KernelCase]], setup: Setup, place: Place
) -> Iterator[dict[str, Any]]:
    """The results of cases, and a row that says why there are no more of them where one fails."""
    found: list[dict[str, Any]] = []

    def run() -> dict[str, Any]:
        for case in make():
            for result in measure(case, setup):
                record.say(line(result))
                errors = {"ours": result.ours.error, result.opponent: result.theirs.error}
                if all(math.isfinite(value) for error in errors.values() for value in error.values()):
                    found.append(record.as_row(result))
                else:
                    found.append(failed(f"{result.op} beside {result.opponent}", f"not finite: {errors}"))
        return {}

    row = attempt(what, run, place)
    yield from found
    if row["status"] != "ok":
        yield row


def extra_peak(call: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], int | None]:
    """The outputs of a call, and the peak of the memory that the caching allocator handed out during it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return outputs, torch.cuda.max_memory_allocated() - before
