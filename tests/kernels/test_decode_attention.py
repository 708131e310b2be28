"""cpu_decode_attention against attention in float64: blocks in common, lengths, shapes, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.kernel_grid import F64
from tests.support.levels import LEVELS, at_level

pytestmark = pytest.mark.native

# A request: the blocks that it begins with, by name (requests with equal names share them), and its length in keys.
Request = tuple[str, int]

BATCHES: dict[str, list[Request]] = {
    "one": [("", 1)],
    "nothing shared": [("", 70), ("", 5), ("", 32), ("", 33), ("", 64)],
    "two groups of ragged responses": [("abc", 97 + i) for i in range(5)] + [("de", 65 + 17 * i) for i in range(4)],
    "groups in turns": [("abc", 100), ("de", 70), ("abc", 120), ("de", 64), ("", 3), ("abc", 97)],
    "whole blocks": [("ab", 64), ("ab", 64), ("ab", 96), ("abc", 96)],
    "groups within a group": [("abcd", 130), ("abcd", 128), ("abef", 129), ("abef", 200), ("ab", 64), ("g", 40)],
    # The block is shared, but its last keys are not the first request's.
    "a shared block that one request sees in part": [("ab", 40), ("ab", 64), ("ab", 90)],
    "many": [("abcdefgh", 257 + i) for i in range(17)],
}


@dataclass
class Problem:
    query: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    scale: float

    def run(self) -> Tensor:
        # Rows of out as a wider tensor has them.
        out = torch.full((len(self.query), self.query.shape[1] + 1, self.query.shape[2]), torch.nan)[:, 1:]
        torch.ops.gadcore.cpu_decode_attention(
            self.query, self.keys, self.values, self.table, self.lengths, self.scale, out
        )
        return out

    def truth(self) -> Tensor:
        """[M, Hq, D] float64, one request and one head at a time."""
        heads, block = self.keys.shape[1], self.keys.shape[2]
        shared = self.query.shape[1] // heads
        out = torch.empty(self.query.shape, dtype=F64)
        for i, length in enumerate(self.lengths.tolist()):
            blocks = self.table[i, : -(-length // block)].long()
            for h in range(self.query.shape[1]):
                # In a block keys lie transposed: [D, B].
                keys = self.keys[blocks, h // shared].reshape(len(blocks), -1, block).mT.flatten(0, 1)[:length]
                values = self.values[blocks, h // shared].flatten(0, 1)[:length]
                p = (keys.to(F64) @ self.query[i, h].to(F64) * self.scale).softmax(0)
                out[i, h] = p @ values.to(F64)
        return out


def problem(requests: list[Request], heads: int = 3, shared: int = 3, size: int = 64, block: int = 32) -> Problem:
    generator = torch.Generator().manual_seed(len(requests))
    numbers: dict[str, int] = {}
    own = 0
    rows = []
    for names, length in requests:
        needed = -(-length // block)
        row = [numbers.setdefault(names[: i + 1], len(numbers) + own) for i in range(min(len(names), needed))]
        while len(row) < needed:
            row.append(len(numbers) + own)
            own += 1
        rows.append(row)
    count, width = len(numbers) + own, max(map(len, rows)) + 2
    # Blocks lie in the memory in another order than in the requests, and what no request sees is not a number.
    place = torch.randperm(count, generator=generator)
    table = torch.full((len(rows), width), -1, dtype=torch.int32)
    seen = torch.zeros(count, block, dtype=torch.bool)
    for i, (row, (_, length)) in enumerate(zip(rows, requests, strict=True)):
        table[i, : len(row)] = place[row]
        for j, b in enumerate(row):
            seen[place[b], : length - j * block] = True
    cache = torch.randn(count, heads, 2 * block, size, generator=generator)
    keys, values = cache.chunk(2, dim=2)
    hidden = ~seen[:, None].expand(count, heads, block)
    values[hidden] = torch.nan
    transposed = keys.reshape(count, heads, size, block).masked_fill(hidden[:, :, None], torch.nan)
    keys.copy_(transposed.view(keys.shape))
    # Queries as slices of one tensor with keys and values.
    query = torch.randn(len(rows), heads * (shared + 2), size, generator=generator)[:, : heads * shared]
    lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
    return Problem(query, keys, values, table, lengths, size**-0.5)


def check(p: Problem, tolerance: float = 2e-6) -> None:
    truth, actual = p.truth(), p.run()
    error = (actual.to(F64) - truth).abs().amax(-1) / truth.abs().amax(-1)
    assert error.max() < tolerance, error.max()


@pytest.mark.parametrize("batch", BATCHES)
def test_against_float64(batch: str) -> None:
    check(problem(BATCHES[batch]))


@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (3, 1), (2, 2), (1, 7), (2, 16)])
def test_shapes(heads: int, shared: int, size: int) -> None:
    check(problem(BATCHES["groups within a group"], heads, shared, size))


@pytest.mark.parametrize("block", [64, 96])
def test_longer_blocks(block: int) -> None:
    check(problem([(names, length * block // 32 - 1) for names, length in BATCHES["groups in turns"]], block=block))


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    with at_level(level):
        check(problem(BATCHES["groups within a group"], size=96))
        check(problem(BATCHES["two groups of ragged responses"]))


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        for batch in BATCHES.values():
            p = problem(batch)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(p.run())
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", BATCHES)
def test_other_requests_change_no_bit(batch: str) -> None:
    """The samples of a prompt must not depend on what they are decoded beside."""
    p = problem(BATCHES[batch])
    together = p.run()
    for i in range(len(p.query)):
        alone = Problem(p.query[i : i + 1], p.keys, p.values, p.table[i : i + 1], p.lengths[i : i + 1], p.scale)
        assert torch.equal(alone.run()[0], together[i])


def test_scores_whose_exponentials_overflow() -> None:
    p = problem(BATCHES["groups within a group"])
    p.query *= 60
    # A score of 200 is rounded to 1e-5, which its exponential takes over.
    check(p, 5e-5)


def test_scores_that_are_not_finite() -> None:
    p = problem([("ab", 80), ("ab", 90), ("", 40)])
    p.query[1, 0, 0] = torch.nan
    actual = p.run()
    assert actual[1, 0].isnan().all()
    actual[1, 0] = 0
    assert actual.isfinite().all()


def test_what_is_refused() -> None:
    good = problem([("a", 40), ("a", 33)])

    def refused(match: str, **changed: Tensor) -> None:
        p = Problem(**{**vars(good), **changed})
        with pytest.raises(RuntimeError, match=match):
            p.run()

    refused(r"query must be float32 \[M, Hq, D\]", query=good.query.double())
    refused("D a multiple of 32", query=good.query[..., :48].contiguous())
    refused(r"key_cache and value_cache must be float32 \[N, Hk, B, 64\]", keys=good.keys.double())
    refused("B a multiple of 32", keys=good.keys[:, :, :16], values=good.values[:, :, :16])
    refused("without gaps", values=good.values[:, :, ::2], keys=good.keys[:, :, ::2])
    refused("3 key heads do not divide 8 query heads", query=good.query[:, :8])
    refused(r"block_table must be int32 \[2, blocks\]", table=good.table.long())
    refused(r"seq_lens must be contiguous int32 \[2\]", lengths=good.lengths[:1])
    refused(r"seq_lens\[1\] must be 1 to 128, is 0", lengths=torch.tensor([40, 0], dtype=torch.int32))
    refused(r"seq_lens\[0\] must be 1 to 128, is 129", lengths=torch.tensor([129, 1], dtype=torch.int32))
    refused(r"block_table\[0, 2\] must be 0 to 2, is -1", lengths=torch.tensor([65, 1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"out must be float32 \[2, 9, 64\]"):
        torch.ops.gadcore.cpu_decode_attention(
            *(good.query, good.keys, good.values, good.table, good.lengths, 1.0, torch.empty(2, 9, 32))
        )
