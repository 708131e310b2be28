"""No sample ends a run, whatever its tokens are: it is cut as a teacher's response is, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.data.groups import Group, Response
from gadcore.models.discriminator import Discriminator
from tests.support.builders import TEMPLATE, groups, response
from tests.support.tiny import save_tiny

SPECIAL = TEMPLATE.tokenizer.convert_tokens_to_ids("<|im_start|>")
PADDED = len(TEMPLATE.tokenizer) + 5


def drawn(*ids: int) -> Response:
    """A sample of the student's, as an engine makes it of the ids that it has drawn."""
    text, finished = TEMPLATE.text_of(ids)
    return Response(text, ids, finished, tuple(-1.0 for _ in ids))


@pytest.fixture
def d(tmp_path: Path) -> Discriminator:
    return Discriminator.load(str(save_tiny(tmp_path / "model")), device="cpu")


def with_sample(sample: Response) -> list[Group]:
    batch = groups(2, 2)
    batch[1].samples[0] = sample
    return batch


@pytest.mark.parametrize("ids", [(PADDED,), (PADDED, PADDED + 1), (TEMPLATE.end_id,), (PADDED, TEMPLATE.end_id)])
def test_samples_without_text(d: Discriminator, ids: tuple[int, ...]) -> None:
    sample = drawn(*ids)
    assert sample.text == ""
    scores = d.score(with_sample(sample), backward=True)
    assert scores.empty == (not sample.finished) and scores.cut == 0
    assert all(isinstance(reward, float) for group in scores.rewards for reward in group)
    d.step(1e-4)


def test_an_empty_teacher_response_that_was_cut_is_the_same_sequence(d: Discriminator) -> None:
    batch = with_sample(drawn(PADDED))
    batch[1].teacher = Response("", (PADDED,), False)
    scores = d.score(batch, backward=False)
    assert scores.rewards[1][0] == scores.teacher_scores[1]


def test_special_tokens_that_take_more_tokens_as_text_than_the_context_has(d: Discriminator) -> None:
    sample = drawn(*[SPECIAL] * 30)
    text = TEMPLATE.response_ids(sample.text, finished=False)
    assert d.context_tokens is not None and len(text) > d.context_tokens > 30
    batch = with_sample(sample)
    scores = d.score(batch, backward=True)
    assert (scores.cut, scores.empty) == (1, 0)
    tokens = d.tokens(batch)[1]
    assert tokens.responses[1] == text[: d.context_tokens - len(tokens.prompt)]
    d.step(1e-4)


def test_a_sample_that_is_far_longer_than_a_micro_batch_is_cut(d: Discriminator) -> None:
    batch = with_sample(drawn(*[SPECIAL] * 24))
    d.micro_batch_tokens = 32
    assert len(d.tokens(batch)[1].responses[1]) == 48, "twice what the student drew"
    assert d.score(batch, backward=False).cut == 1


def test_other_samples_are_never_cut(d: Discriminator) -> None:
    batch = with_sample(response("It is a city on the Seine.", finished=False))
    d.micro_batch_tokens = 1
    assert d.tokens(batch)[1].responses[1] == batch[1].samples[0].token_ids
    assert d.score(batch, backward=False).cut == 0
