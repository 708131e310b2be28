"""d key and d value of prefix_attention: the parts of the rows that see a prompt, their sum, programs and places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.offline.interpreter import Observer, observe
from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.triton import _prefix_walk
from gadcore.kernels.triton import prefix_attention as kernels
from gadcore.kernels.triton._prefix_keys import SUM_ROWS, parts_of
from tests.support.prefix_kernels import BF16, KERNELS, RAGGED, check, inputs, run


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`parts(n)`: the rows that see a prompt's keys are cut into n."""
    return lambda n: monkeypatch.setattr(kernels, "parts_of", lambda *arguments: n)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "group, count, dtype",
    [
        (1, 8, torch.float32),
        (3, 1, torch.float32),
        (3, 3, BF16),
        (4, 2, torch.float32),
        (8, 1, BF16),
        (8, 8, torch.float32),
    ],
    ids=str,
)
def test_parts_of_the_rows_that_see_a_prompt(
    tiles: Callable[[int, int], None], parts: Callable[[int], None], group: int, count: int, dtype: torch.dtype
) -> None:
    """More parts than there are tiles of rows, too: some have nothing to add."""
    tiles(32, 16)
    parts(count)
    check(inputs(RAGGED, (2 * group, 2), 64, dtype), RAGGED)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("window, count", [(5, 8), (20, 1), (20, 2), (51, 3)])
def test_parts_with_a_window(
    tiles: Callable[[int, int], None], parts: Callable[[int], None], window: int, count: int
) -> None:
    tiles(16, 16)
    parts(count)
    check(inputs(RAGGED, (3, 1), 64, torch.float32), RAGGED, window=window)


class Work(Observer):
    """Multiply-adds of every program of _d_key_value_kernel."""

    def __init__(self) -> None:
        self.of: list[int] = []
        self.counting = False

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[Tensor]) -> None:
        self.counting = kernel == "_d_key_value_kernel"

    def program(self, index: int) -> None:
        if self.counting:
            self.of.append(0)

    def dot(self, rows: int, columns: int, depth: int) -> None:
        if self.counting:
            self.of[-1] += rows * columns * depth


def test_no_program_of_a_prompt_keeps_the_others_waiting(tiles: Callable[[int, int], None]) -> None:
    """Two key heads, as Qwen2.5-3B has: without parts the keys of a prompt take 8 times as long as any others."""
    tiles(16, 16)
    layout = PrefixLayout.of([48], [[64] * 8])
    work = Work()
    with observe(work):
        run(inputs(layout, (4, 2), 64, BF16), layout, 0.125, 0)
    # Of a response's first keys, which all rows of the response see.
    of_response = 64 * 2 // 16 * 4 * 16 * 16 * 64
    assert 0 < max(work.of) <= 1.5 * of_response


@pytest.mark.parametrize(
    "tokens, prompts, prompt_tokens, segments, heads, expected",
    [
        (3500, 1, 300, 9, 2, 8),  # one group of Qwen2.5-3B
        (14336, 1, 2048, 9, 2, 7),
        (16384, 5, 1500, 45, 2, 7),
        (16384, 5, 1500, 45, 8, 2),
        (16384, 64, 12800, 576, 8, 1),  # many groups: there are programs enough
        (2048, 1, 2048, 1, 2, 8),  # a prompt without responses
        (1, 1, 1, 1, 1, 8),
    ],
)
def test_how_many_parts(
    tokens: int, prompts: int, prompt_tokens: int, segments: int, heads: int, expected: int
) -> None:
    assert parts_of(tokens, prompts, prompt_tokens, segments, heads, 132) == expected


@triton.jit
def _places_among_kernel(offsets, prompt_of, out, segments, prompts, ROWS: tl.constexpr):
    segment, first, before = _prefix_walk.place_among(
        offsets, prompt_of, segments, prompts == 1, tl.program_id(0), ROWS
    )
    at = out + 3 * tl.program_id(0)
    tl.store(at, segment)
    tl.store(at + 1, first)
    tl.store(at + 2, before.to(tl.int32))


@pytest.mark.parametrize("prompts", [True, False])
def test_every_tile_of_prompts_and_of_responses_has_a_place(prompts: bool) -> None:
    """270 segments: offsets are looked at in two parts."""
    rows = 4
    lengths = torch.randint(1, 9, (27, 10), generator=torch.Generator().manual_seed(1)).tolist()
    layout = PrefixLayout.of([group[0] for group in lengths], [group[1:] for group in lengths])
    K = len(layout.prompt_of)
    count = layout.offsets.diff()
    mine = [k for k in range(K) if (k % 10 == 0) == prompts]
    total = int(sum(count[k] for k in mine))
    found = torch.empty(total // rows + len(mine), 3, dtype=torch.int32)
    _places_among_kernel[(len(found),)](layout.offsets, layout.prompt_of, found, K, int(prompts), ROWS=rows)
    before = [int(sum(count[j] for j in mine if j < k)) for k in mine]
    expected = [(k, first, b) for k, b in zip(mine, before, strict=True) for first in range(0, int(count[k]), rows)]
    assert [(k, first, b) for k, first, b in found.tolist() if first < count[k]] == expected
    assert (found[:, 1] >= 0).all() and len(found) - len(expected) <= len(mine)


class Launches(Observer):
    def __init__(self) -> None:
        self.grids: list[tuple[str, tuple[int, int, int]]] = []

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[Tensor]) -> None:
        self.grids.append((kernel, grid))


def test_one_launch_forward_and_two_or_three_backward(
    tiles: Callable[[int, int], None], parts: Callable[[int], None]
) -> None:
    """A program for every 16 rows of a key head's 4 query heads, or for every 32 keys and part, and one more per
    segment; the parts of the prompts' keys are added up at the end."""
    tiles(16, 32)
    T, K, G, P = RAGGED.tokens, len(RAGGED.prompt_of), len(RAGGED.prompts), sum(RAGGED.prompts)
    by_rows = (2 * (T * 4 // 16 + K), 1, 1)
    for count in (1, 5):
        parts(count)
        seen = Launches()
        with observe(seen):
            run(inputs(RAGGED, (8, 2), 64, BF16), RAGGED, 0.125, 0)
        by_keys = (2 * (count * (P // 32 + G) + (T - P) // 32 + K - G), 1, 1)
        summed = [("_sum_parts_kernel", (2 * (P // SUM_ROWS + G), 1, 1))] if count > 1 else []
        assert seen.grids == [*zip(KERNELS, (by_rows, by_rows, by_keys), strict=True), *summed]
