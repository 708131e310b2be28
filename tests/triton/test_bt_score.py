"""The Bradley-Terry kernels: races, bounds, program order, offsets beyond 2^31, and their numbers against fp64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor

import bench.offline.interpreter as interpreter
from bench.offline.guard import Guard
from gadcore.kernels.triton import bt_score
from tests.support import bt_problem
from tests.support.bt_problem import DTYPES, Arguments, problem

Shuffled = Callable[[int], AbstractContextManager[None]]


def check(arguments: Arguments) -> None:
    bt_problem.check(bt_score.forward, bt_score.backward, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 96, 1030])
def test_against_fp64(guarded: Guard, width: int, dtype: torch.dtype) -> None:
    check(bt_problem.ragged(width, dtype))


@pytest.mark.parametrize("samples", range(1, 17))
def test_group_sizes(guarded: Guard, samples: int) -> None:
    check(problem([1 + samples] * 3, [True, True, False], 40, torch.bfloat16, seed=samples))


def test_more_sequences_than_one_scan_or_tile(guarded: Guard) -> None:
    """1,100 sequences in 40 rows: every row of d_hidden is the sum of about 27."""
    check(problem([275] * 4, [True] * 4, 24, torch.float32, tokens=40))


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_no_sequences(guarded: Guard, sizes: list[int]) -> None:
    check(problem(sizes, [True] * len(sizes), 20, torch.float32))


def test_without_bias_and_with_heads_of_other_dtypes(guarded: Guard) -> None:
    arguments = problem([4, 3], [True, True], 70, torch.bfloat16)
    check({**arguments, "bias": None})
    check({**arguments, "weight": arguments["weight"].half(), "bias": arguments["bias"].reshape(1).bfloat16()})


@pytest.mark.parametrize("layout", bt_problem.LAYOUTS)
def test_strides(guarded: Guard, layout: str) -> None:
    check(bt_problem.strided(layout, torch.bfloat16))


def test_equal_rows_score_equally_to_the_bit() -> None:
    """In every place of a tile, and in the tiles of a group of more than one."""
    bt_problem.check_equal_rows(bt_score.forward, bt_problem.equal_rows(torch.bfloat16))


def test_large_margins() -> None:
    bt_problem.check_large_margins(bt_score.forward, bt_problem.large_margins())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_sequence_are_zero(guarded: Guard, dtype: torch.dtype) -> None:
    bt_problem.check_untouched_rows(bt_score.backward, dtype)


def test_program_order_changes_no_bit(shuffled_programs: Shuffled) -> None:
    arguments = problem([9] * 12, [True] * 12, 200, torch.bfloat16, tokens=60)

    def run() -> list[Tensor]:
        backward = bt_score.backward(bt_problem.grad_scores(arguments), *bt_problem.operands(arguments))
        return [*bt_score.forward(**arguments), *backward]

    first = run()
    for seed in range(3):
        with shuffled_programs(seed):
            for got, expected in zip(run(), first, strict=True):
                assert torch.equal(got, expected)


class Launches(interpreter.Observer):
    def __init__(self) -> None:
        self.grids: list[tuple[int, int, int]] = []

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[Tensor]) -> None:
        self.grids.append(grid)


@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, 64), (torch.float32, 32)])
def test_one_launch_each_way(dtype: torch.dtype, columns: int) -> None:
    """Forward a program per group; backward one per 128 bytes of a row for d_weight, one per 16 rows of d_hidden."""
    arguments = problem([3] * 5, [True] * 5, 130, dtype, tokens=50)
    seen = Launches()
    with interpreter.observe(seen):
        bt_score.forward(**arguments)
        bt_score.backward(torch.ones(15), *bt_problem.operands(arguments))
    assert seen.grids == [(5, 1, 1), (-(-130 // columns) + 4, 1, 1)]


def lazily_zero(elements: int) -> Tensor:
    """float16 zeros that take memory only where they are written."""
    return torch.from_numpy(np.zeros(elements, dtype=np.float16))


@pytest.mark.parametrize("strides", [(2**30 + 8, 1), (1, 2**25)], ids=["rows", "columns"])
def test_reads_beyond_2_to_the_31_elements(strides: tuple[int, int]) -> None:
    tokens, width = 3, 70
    hidden = lazily_zero(2 * strides[0] + 69 * strides[1] + 1).as_strided((tokens, width), strides)
    assert 2 * strides[0] + 69 * strides[1] > 2**31
    arguments = problem([3], [True], width, torch.float16, tokens=tokens)
    hidden.copy_(arguments["hidden"])
    arguments |= {"hidden": hidden, "last_index": torch.tensor([2, 0, 2])}
    torch.use_deterministic_algorithms(False)
    check(arguments)


class EnoughPrograms(interpreter.ObserverError):
    """Ends a launch."""


class OnlyTheFirst(interpreter.Observer):
    """Ends the launch after some programs, and keeps its tensors."""

    def __init__(self, programs: int) -> None:
        self.left = programs
        self.tensors: list[Tensor] = []

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def program(self, index: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise EnoughPrograms


def test_writes_beyond_2_to_the_31_elements() -> None:
    """d_hidden of 2^20 + 16 rows; only the last two programs run, and only what they write takes memory."""
    torch.use_deterministic_algorithms(False)
    tokens, width = 2**20 + 16, 2048
    hidden = lazily_zero(tokens * width).view(tokens, width)
    weight = torch.randn(width)
    last_index = torch.tensor([tokens - 1, tokens - 19, 5])
    observer = OnlyTheFirst(2)
    last_first = interpreter.program_order(lambda n: np.arange(n)[::-1])
    with interpreter.observe(observer), last_first, pytest.raises(EnoughPrograms):
        bt_score.backward(torch.tensor([2.0, -1.0, 4.0]), hidden, last_index, weight)
    (d_hidden,) = (t for t in observer.tensors if t.shape == hidden.shape and t.data_ptr() != hidden.data_ptr())
    expected = torch.zeros(32, width, dtype=torch.float16)
    expected[-1], expected[-19] = (2 * weight).half(), (-weight).half()
    assert torch.equal(d_hidden[-32:], expected)
