"""Groups: rows become rectangles whose indices point where they say, and cuts lose nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gadcore.groups import Row, collate, micro_batches, row_micro_batches

PAD = 0
token_ids = st.lists(st.integers(1, 99), min_size=1, max_size=9).map(tuple)
rows_of_any_shape = st.lists(st.builds(Row, token_ids, token_ids), min_size=1, max_size=7)
sizes_of_items = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), max_size=30)


@given(rows_of_any_shape)
def test_indices_point_at_the_predicting_and_the_last_positions(rows: list[Row]) -> None:
    batch = collate(rows, PAD)
    flat = batch.input_ids.flatten()
    width = max(map(len, rows))
    assert batch.input_ids.shape == (len(rows), width)
    assert batch.lengths == tuple(len(row.response_ids) for row in rows)
    assert batch.targets.tolist() == [token for row in rows for token in row.response_ids]
    # The token behind every predicting position is the target; the first of them is the prompt's last token.
    assert torch.equal(flat[batch.predict_index + 1], batch.targets)
    firsts = torch.stack([chunk[0] for chunk in batch.predict_index.split(batch.lengths)])
    assert flat[firsts].tolist() == [row.prompt_ids[-1] for row in rows]
    rows_of_tokens = [i for i, row in enumerate(rows) for _ in row.response_ids]
    assert (batch.predict_index // width).tolist() == rows_of_tokens
    assert flat[batch.last_index].tolist() == [row.response_ids[-1] for row in rows]
    for i, row in enumerate(rows):
        padding = [PAD] * (width - len(row))
        assert batch.input_ids[i].tolist() == [*row.prompt_ids, *row.response_ids, *padding]
        assert batch.last_index[i] == i * width + len(row) - 1


def test_collate_by_hand() -> None:
    batch = collate([Row((5, 6), (7,)), Row((8,), (9, 1, 2))], pad_id=PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 1, 2]]
    assert batch.predict_index.tolist() == [1, 4, 5, 6]
    assert batch.targets.tolist() == [7, 9, 1, 2]
    assert batch.last_index.tolist() == [2, 7]
    tensors = (batch.input_ids, batch.predict_index, batch.targets, batch.last_index)
    assert all(tensor.dtype == torch.int64 for tensor in tensors)


def padded(sizes: list[tuple[int, int]], cut: range) -> int:
    return sum(sizes[i][0] for i in cut) * max(sizes[i][1] for i in cut)


@given(sizes_of_items, st.integers(1, 400))
def test_micro_batches_keep_order_and_budget_and_are_as_full_as_they_can_be(
    sizes: list[tuple[int, int]], budget: int
) -> None:
    cuts = list(micro_batches(sizes, budget))
    assert [i for cut in cuts for i in cut] == list(range(len(sizes)))
    for cut in cuts:
        assert len(cut) == 1 or padded(sizes, cut) <= budget
    for cut, following in zip(cuts, cuts[1:], strict=False):
        assert padded(sizes, range(cut.start, following.start + 1)) > budget


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([], 10, []),
        ([(1, 5), (1, 5)], 10, [range(0, 2)]),
        ([(1, 5), (1, 6)], 10, [range(0, 1), range(1, 2)]),
        ([(4, 9)], 10, [range(0, 1)]),
        ([(1, 1), (4, 9), (1, 1), (1, 1)], 10, [range(0, 1), range(1, 2), range(2, 4)]),
        ([(3, 2), (1, 5)], 19, [range(0, 1), range(1, 2)]),  # the longest row widens all four
        ([(3, 2), (1, 5)], 20, [range(0, 2)]),
    ],
)
def test_micro_batches_by_hand(sizes: list[tuple[int, int]], budget: int, expected: list[range]) -> None:
    assert list(micro_batches(sizes, budget)) == expected


@given(rows_of_any_shape, st.integers(1, 60))
def test_row_micro_batches_hold_every_row_once_and_the_longest_first(rows: list[Row], budget: int) -> None:
    cuts = list(row_micro_batches(rows, budget))
    flat = [i for cut in cuts for i in cut]
    assert sorted(flat) == list(range(len(rows)))
    # Rows of one length stay in the order of the batch: the cut is the same in every run.
    assert flat == sorted(flat, key=lambda i: (-len(rows[i]), i))
    for cut in cuts:
        assert len(cut) == 1 or len(cut) * max(len(rows[i]) for i in cut) <= budget


def test_rows_of_similar_length_share_a_micro_batch() -> None:
    rows = [Row((1,), (2,) * n) for n in (1, 9, 1, 9)]
    assert list(row_micro_batches(rows, 20)) == [[1, 3], [0, 2]]
