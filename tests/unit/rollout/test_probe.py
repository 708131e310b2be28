"""The probe: which syncs it looks at, at which tokens, and what it says."""

from __future__ import annotations

import pytest
import torch

from gadcore.data.groups import Response
from gadcore.errors import UserError
from gadcore.rollout.engine import SampleRequest
from gadcore.rollout.probe import BOUNDS, Probe


def requests(*lengths: int) -> list[SampleRequest]:
    return [SampleRequest(tuple(range(1, n + 1)), 2, n) for n in lengths]


def responses(*lengths: int, logprob: float = -2.0) -> list[list[Response]]:
    return [[Response("x", (7,) * n, True, (logprob,) * n), Response("y", (8,), True, (0.0,))] for n in lengths]


class Trainer:
    """Gives every token the same log-prob, and keeps what it was asked."""

    def __init__(self, logprob: float) -> None:
        self.logprob, self.asked = logprob, []

    def __call__(self, groups):
        self.asked += [(g.prompt.token_ids, [s.token_ids for s in g.samples]) for g in groups]
        return [[torch.full((len(s.token_ids),), self.logprob) for s in g.samples] for g in groups]


def test_the_first_sync_and_every_kth_from_there() -> None:
    probe = Probe(Trainer(0), every=3, dtype="float32")
    assert [probe.due() for _ in range(8)] == [True, False, False, True, False, False, True, False]
    never = Probe(Trainer(0), every=0, dtype="float32")
    assert not any(never.due() for _ in range(3))


def test_the_shortest_prompts_and_the_beginning_of_one_sample_each() -> None:
    trainer = Trainer(-2.0)
    probe = Probe(trainer, every=1, dtype="float32")
    probe.check(requests(9, 2, 8, 5, 4, 3), responses(1, 2, 3, 100, 0, 6))
    # A response without a token tells nothing.
    assert trainer.asked == [
        ((1, 2), [(7, 7)]),
        ((1, 2, 3), [(7,) * 6]),
        ((1, 2, 3, 4, 5), [(7,) * 64]),
    ]
    probe.check(requests(3), responses(0))
    assert len(trainer.asked) == 3


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_both_figures_where_they_differ_by_more_than_the_format(dtype: str) -> None:
    bound = BOUNDS[dtype]
    for logprob in (-2 - 0.9 * bound, -2 + 0.9 * bound):
        Probe(Trainer(logprob), every=1, dtype=dtype).check(requests(3, 4), responses(2, 3))
    for logprob in (-2 - 1.5 * bound, float("nan")):
        probe = Probe(Trainer(logprob), every=1, dtype=dtype)
        probe.due()
        with pytest.raises(UserError) as error:
            probe.check(requests(3, 4), responses(2, 3))
        said = str(error.value)
        assert said.startswith("the probe of sync 1: 5 sampled tokens have a mean log-prob of -2.0000 by the sampler")
        assert f"of {logprob:.4f} by the trainer" in said and f"{dtype} explains {bound}" in said
        assert "\n" not in said
