"""SODA beside TRL: the literal DPO that both are held to, and that a wrong side gets no speed."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import __main__ as command
from bench.soda import suite, tables
from bench.soda.problem import BETA, Shape, gradient_of, literal, rows_of, tokens_of
from tests.support import naive
from tests.support.builders import exact_norms
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def batch():
    return Shape.of("6x9x2x3").batch(vocabulary=320, end_id=2)


def test_shapes_have_their_lengths(batch) -> None:
    assert [len(g.prompt.token_ids) for g in batch] == [6, 6, 6]
    responses = [r.token_ids for g in batch for r in (g.teacher, *g.samples)]
    assert len(responses) == 9 and all(4 <= len(ids) <= 9 and ids[-1] == 2 for ids in responses)
    assert tokens_of(batch) == 18 + sum(map(len, responses)) < sum(map(len, rows_of(batch)))


def test_the_literal_gradient_is_that_of_the_whole_loss(batch) -> None:
    model = exact_norms(tiny_model().double())
    found = literal(model, batch)
    model.zero_grad()
    logprob = naive.token_logprobs
    losses = []
    for group, known in zip(batch, found.reference, strict=True):
        own = [logprob(model, group.prompt.token_ids, r.token_ids, 1.0).sum() for r in (group.teacher, *group.samples)]
        h = [BETA * (a - b) for a, b in zip(own, known, strict=True)]
        losses += [-torch.log(torch.sigmoid(h[0] - other)) for other in h[1:]]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(found.gradient, gradient_of(model), rtol=1e-9, atol=1e-12)


class Wrong(suite.Ours):
    """Pays samples for what the teacher's response should get."""

    name = "TRL"

    def step(self, groups, reference) -> float:
        return super().step(groups, [[known + 1.0, *others] for known, *others in reference])


def test_a_side_that_differs_from_the_literal_dpo_has_no_speed(batch) -> None:
    model = tiny_model()
    expected = literal(exact_norms(copy.deepcopy(model).double()), batch)
    right, wrong = suite.Ours(copy.deepcopy(model)), Wrong(copy.deepcopy(model))
    row = suite.measured("6x9x2x3", batch, expected, [wrong, right], rounds=2)
    assert row["gate"] == "fail" and "ratio" not in row
    assert row["ours"]["gradient_error"] < 1e-5 < suite.TOLERANCE < row["theirs"]["gradient_error"]
    assert "| 6 | 9 | 2 | 3 |" in tables.document(lambda name: [row])
    assert " | - | - | - | " in tables.document(lambda name: [row])

    again = suite.Ours(copy.deepcopy(model))
    again.name = "TRL"
    row = suite.measured("6x9x2x3", batch, expected, [again, right], rounds=2)
    assert row["gate"] == "pass" and row["ratio"] > 0
    assert f"{row['ours']['tokens_per_second']:.0f} | {row['ratio']:.2f}" in tables.document(lambda name: [row])


def test_the_document_is_made_of_the_results() -> None:
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()


def test_a_case_that_is_none_is_refused(capsys) -> None:
    assert command.main(["soda", "--cases", "12x8"]) == 2
    assert "a case is PROMPTxRESPONSExSAMPLESxGROUPS" in capsys.readouterr().err
