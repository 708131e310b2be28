"""A batch that the discriminator gets in parts: the scores, figures and gradient of the whole one."""

from __future__ import annotations

import pytest
import torch

from gadcore.data.groups import micro_batches
from tests.support.builders import assert_same_gradients, discriminator, gradients, groups

BUDGET = 150


def scored(ours, parts, *, pairs: int | None = None, backward: bool = True):
    batch = [group for part in parts for group in part]
    ours.optimizer.adamw.zero_grad()
    scoring = ours.scoring(pairs or sum(len(group.samples) for group in batch), backward=backward)
    for part in parts:
        scoring.add(part)
    return scoring.scores(), gradients(ours.model)


@pytest.mark.parametrize("backward", [True, False])
def test_parts_of_any_size_are_the_whole(tmp_path, backward: bool) -> None:
    ours, batch = discriminator(tmp_path, micro_batch_tokens=BUDGET), groups(7, 4, ragged=True)
    whole = ours.score(batch, backward=backward)
    expected = gradients(ours.model)
    for cut in ([3, 7], [1, 2, 3, 4, 5, 6, 7], [6, 7]):
        parts = [batch[start:end] for start, end in zip([0, *cut], cut, strict=False)]
        found, gradient = scored(ours, parts, backward=backward)
        torch.testing.assert_close(found.sample_scores, whole.sample_scores, rtol=1e-10, atol=1e-12)
        assert (found.sizes, found.tokens, found.cut) == (whole.sizes, whole.tokens, whole.cut)
        for name in ("loss", "accuracy", "margin"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-10)
        if backward:
            assert_same_gradients(gradient, expected, rtol=1e-10, atol=1e-12)
        else:
            assert gradient == {}


def test_parts_that_are_cut_alike_are_the_whole_to_the_bit(tmp_path) -> None:
    budget = 400
    ours = discriminator(tmp_path, torch.float32, micro_batch_tokens=budget)
    batch = groups(9, 3)
    tokens = ours.tokens(batch)
    cuts = micro_batches(tokens, budget, ours.cost, teacher=True)
    # Whole groups each, in the order in which they pass through.
    parts = [[batch[part.group] for part in cut] for cut in cuts]
    assert len(parts) > 2 and sorted(g.prompt.index for part in parts for g in part) == list(range(9))
    ordered = [group for part in parts for group in part]
    (found, gradient), (whole, expected) = scored(ours, parts), scored(ours, [batch])
    assert found.loss == whole.loss and found.margin == whole.margin
    assert all(torch.equal(gradient[name], expected[name]) for name in expected)
    places = {group.prompt.index: scores for group, scores in zip(batch, whole.rewards, strict=True)}
    assert found.rewards == [places[group.prompt.index] for group in ordered]


def test_a_batch_that_is_not_whole_is_refused(tmp_path) -> None:
    ours, batch = discriminator(tmp_path), groups(3, 2)
    with pytest.raises(ValueError, match="4 of 6 samples were scored"):
        scored(ours, [batch[:2]], pairs=6)
