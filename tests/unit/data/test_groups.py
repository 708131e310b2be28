"""Groups: packed rows whose indices point where they say, and cuts that lose nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadcore.data.groups import Cost, GroupedBatch, GroupPart, GroupTokens, micro_batches, packed, select

token_ids = st.lists(st.integers(1, 99), min_size=1, max_size=9).map(tuple)
batches = st.lists(
    st.builds(GroupTokens, token_ids, st.lists(token_ids, min_size=1, max_size=5).map(tuple)), min_size=1, max_size=6
)
COST = Cost(per_token=100, per_pair=1)


@given(batches, st.booleans())
def test_indices_point_at_the_predicting_and_the_last_tokens(groups: list[GroupTokens], last_tokens: bool) -> None:
    batch = GroupedBatch.of(groups, last_tokens=last_tokens)
    ids = batch.input_ids[0]
    responses = [(group, response) for group in groups for response in group.responses]
    assert batch.lengths == tuple(len(response) for _, response in responses)
    assert batch.targets.tolist() == [token for _, response in responses for token in response]
    predicting = [[group.prompt[-1], *response[:-1]] for group, response in responses]
    assert ids[batch.predicting[batch.predicted_by]].tolist() == [token for row in predicting for token in row]
    # Tokens of a sequence are predicted at its own positions, one after the other.
    positions = batch.layout.positions[batch.predicting[batch.predicted_by]].tolist()
    assert positions == [len(g.prompt) - 1 + t for g, response in responses for t in range(len(response))]
    if last_tokens:
        assert ids[batch.last_index][batch.packed_as].tolist() == [response[-1] for _, response in responses]
        assert len(ids) == sum(len(group.prompt) + sum(map(len, set(group.responses))) for group in groups)
    else:
        assert len(batch.last_index) == len(batch.packed_as) == 0
        assert len(ids) == sum(len(group.prompt) + sum(len(r) - 1 for r in set(group.responses)) for group in groups)


def test_a_group_by_hand() -> None:
    batch = GroupedBatch.of([GroupTokens((5, 6), ((7,), (8, 9))), GroupTokens((1,), ((2, 3),))], last_tokens=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert batch.layout.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert batch.layout.offsets.tolist() == [0, 2, 3, 5, 6, 8] and batch.layout.prompt_of.tolist() == [0, 0, 0, 3, 3]
    assert batch.predicting[batch.predicted_by].tolist() == [1, 1, 3, 5, 6] and batch.last_index.tolist() == [2, 4, 7]
    without = GroupedBatch.of([GroupTokens((5, 6), ((7,), (8, 9)))], last_tokens=False)
    assert without.input_ids.tolist() == [[5, 6, 8]] and without.predicting[without.predicted_by].tolist() == [1, 1, 2]


@given(batches, st.integers(1, 60), st.booleans(), st.integers(1, 3))
def test_cuts_hold_every_response_once_and_keep_the_budget(groups, budget, teacher, multiple_of) -> None:
    cuts = micro_batches(groups, budget, COST, teacher=teacher, multiple_of=multiple_of)
    assert len(cuts) % multiple_of == 0 and (multiple_of > 1 or all(cuts))
    seen = Counter((part.group, i) for cut in cuts for part in cut for i in part.responses)
    assert set(seen) == {(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))}
    for (_, i), times in seen.items():
        assert times == 1 or (teacher and i == 0)
    for cut in cuts:
        tokens = sum(group.tokens for group in select(groups, cut))
        assert tokens <= budget or (len(cut) == 1 and len(cut[0].responses) <= 1 + teacher)
        assert cut == sorted(cut, key=lambda part: (part.group, part.responses))
        if teacher:
            assert all(part.responses[0] == 0 for part in cut)


def test_equal_responses_are_packed_once() -> None:
    groups = [GroupTokens((5,), ((7, 8), (9,), (7, 8))), GroupTokens((5,), ((7, 8),))]
    batch = GroupedBatch.of(groups, last_tokens=True)
    assert batch.input_ids.tolist() == [[5, 7, 8, 9, 5, 7, 8]]
    assert batch.packed_as.tolist() == [0, 1, 0, 2] and batch.last_index.tolist() == [2, 3, 6]
    assert batch.predicting[batch.predicted_by].tolist() == [0, 1, 0, 0, 1, 4, 5] and batch.lengths == (2, 1, 2, 2)


def test_cuts_balance_cost_and_not_tokens() -> None:
    """One long response costs as much attention as many short ones of more tokens in all."""
    long = GroupTokens((1,) * 10, ((1,) * 90,))
    short = [GroupTokens((1,) * 10, ((1,) * 10,)) for _ in range(6)]
    cuts = micro_batches([long, *short], 120, Cost(per_token=0, per_pair=1), teacher=False)
    assert sorted(len(cut) for cut in cuts) == [1, 6]
    even = micro_batches([long, long, *short], 160, COST, teacher=False)
    assert [sorted(part.group for part in cut) for cut in even] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_pairs_are_those_of_causal_attention() -> None:
    group = GroupTokens((1, 2, 3), ((4, 5), (6,)))
    # prompt 1 + 2 + 3; response tokens see the prompt and themselves: 4 + 5, 4
    assert group.pairs == 6 + 9 + 4 and group.tokens == 6
    assert COST.of(group) == 619


def test_a_group_that_is_too_large_is_split_with_its_prompt_and_teacher() -> None:
    group = GroupTokens((1,) * 4, ((2,) * 3, (3,) * 5, (4,) * 2, (5,) * 6))
    assert micro_batches([group], 15, COST, teacher=True) == [[GroupPart(0, (0, 1, 2))], [GroupPart(0, (0, 3))]]
    assert micro_batches([group], 9, COST, teacher=False) == [
        [GroupPart(0, (3,))],
        [GroupPart(0, (1,))],
        [GroupPart(0, (0, 2))],
    ]


@pytest.mark.parametrize("teacher", [False, True])
def test_processes_share_a_batch_and_take_equally_many_cuts(teacher) -> None:
    groups = [GroupTokens((1,) * (3 + i), tuple((i, j) * (1 + j) for j in range(2 + i))) for i in range(3)]
    said = [[float(i)] * len(r) for i, r in enumerate(r for group in groups for r in group.responses)]
    alone = list(packed(groups, 25, COST, teacher=teacher, logprobs=said))
    shares = [list(packed(groups, 25, COST, teacher=teacher, logprobs=said, rank=r, size=4)) for r in range(4)]
    assert len({len(share) for share in shares}) == 1
    micros = [micro for share in shares for micro in share if not micro.idle]
    responses = Counter(i for micro in micros for i in micro.index.tolist())
    if not teacher:
        assert sorted(responses) == list(range(9)) and set(responses.values()) == {1}
        assert sum(len(micro.tokens.targets) for micro in micros) == sum(len(m.tokens.targets) for m in alone)
        for micro in micros:
            said_here = [value for i in micro.index.tolist() for value in said[i]]
            assert micro.logprobs.tolist() == said_here
    assert sorted(responses) == list(range(9))


@pytest.mark.parametrize("teacher", [False, True])
def test_a_process_without_a_cut_gets_a_group_of_no_result(teacher) -> None:
    groups = [GroupTokens((5, 6), ((7, 8), (9,)))]
    (first,), (second,) = (list(packed(groups, 99, COST, teacher=teacher, rank=r, size=2)) for r in range(2))
    assert not first.idle and first.index.tolist() == [0, 1]
    assert second.idle and not len(second.index)
    assert second.tokens.input_ids.numel() == 1 + teacher and second.sequences.sequences == 1
    assert not teacher or not second.sequences.paired.any()


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more tokens"):
        GroupedBatch.of([GroupTokens((), ((1, 2),))], last_tokens=True)
