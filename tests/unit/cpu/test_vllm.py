"""What gadcore puts into vLLM's layers on a CPU, apart from vLLM: which tokens are computed, which are drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gadcore.cpu.vllm import SharedPrefill, sample_by_one_number

pytestmark = pytest.mark.native

# (text so far, tokens of it that are known already) for every request of a step.
Request = tuple[list[int], int]


class Attention(nn.Module):
    """Every token's output is its query's: the layer only records what it was given."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
        self.seen = query.clone(), key.clone(), value.clone()
        return query * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: None = None) -> Tensor:
        self.rows = len(input_ids)
        hidden = torch.stack([input_ids, positions], 1).double()
        return self.attention(hidden, hidden + 1, hidden + 2, 1.0)


def runner_of(requests: list[Request]) -> SimpleNamespace:
    width = max(len(text) for text, _ in requests) + 3
    # What lies behind a text is left over from other requests.
    ids = np.random.default_rng(0).integers(100, 200, (len(requests), width))
    for row, (text, _) in zip(ids, requests, strict=True):
        row[: len(text)] = text
    starts = np.cumsum([0, *(len(text) - known for text, known in requests)])
    batch = SimpleNamespace(
        num_reqs=len(requests),
        token_ids_cpu=ids,
        num_computed_tokens_cpu=np.array([known for _, known in requests]),
    )
    return SimpleNamespace(input_batch=batch, query_start_loc=SimpleNamespace(np=starts))


def step(requests: list[Request]) -> tuple[Model, Tensor, Tensor]:
    """The model after the step, its output, and the output without sharing."""
    model, runner = Model(), runner_of(requests)
    runner.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"attention": model.attention})
    )
    tokens = torch.tensor([token for text, known in requests for token in text[known:]])
    positions = torch.tensor([p for text, known in requests for p in range(known, len(text))])
    expected = model(input_ids=tokens, positions=positions)
    SharedPrefill(runner, model)
    return model, model(input_ids=tokens, positions=positions, inputs_embeds=None), expected


A, B = [7, 3, 9, 4, 1], [7, 3, 9, 8]


@pytest.mark.parametrize(
    "requests, rows",
    [
        ([(A, 0), (A, 2), (A, 2)], 5),  # siblings whose first blocks are shared already
        ([(A, 2), (A, 0), (A, 4)], 5),  # the longest part need not come first
        ([(A, 0), (B, 0), (A, 3), (B, 2)], 9),  # two groups
        ([([5, 6], 1), (A, 2), (A, 2)], 4),  # beside a request that decodes
        ([(A, 0), (A[:3], 0)], 8),  # a text that another one continues is another text
    ],
)
def test_tokens_in_common_are_computed_once(requests: list[Request], rows: int) -> None:
    model, output, expected = step(requests)
    assert model.rows == rows
    assert torch.equal(output, expected)
    # Every request's own keys and values go into the cache.
    for seen, shift in zip(model.attention.seen, range(3), strict=True):
        assert torch.equal(seen, expected + shift)


def test_decoding_steps_are_left_alone() -> None:
    model, output, expected = step([(A, 4), (A, 4), (B, 3)])
    assert model.rows == 3 and torch.equal(output, expected)


def drawn_by(logits: Tensor, seeds: list[int], **cut: Tensor | None) -> tuple[Tensor, Tensor | None]:
    sampler = SimpleNamespace(forward_cpu=lambda *args: ("vLLM's own", args))
    sample_by_one_number(SimpleNamespace(sampler=SimpleNamespace(topk_topp_sampler=sampler)))
    generators = {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}
    return sampler.forward(logits, generators, cut.get("k"), cut.get("p"))


def test_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, -torch.inf, 0.5, 1.0, -3.0, -torch.inf])
    count = 20_000
    tokens, logprobs = drawn_by(logits.repeat(count, 1), list(range(count)))
    assert logprobs is not None
    torch.testing.assert_close(logprobs[0], logits.log_softmax(0))
    found = torch.bincount(tokens, minlength=6).double()
    expected = logits.double().softmax(0) * count
    possible = expected > 0
    assert found[~possible].eq(0).all()
    # Chi-square with 3 degrees of freedom: above 16.3 once in 1000.
    assert ((found - expected)[possible] ** 2 / expected[possible]).sum() < 16.3


def test_the_last_sum_is_never_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    tokens, _ = drawn_by(torch.tensor([[0.0, 3.0, -torch.inf]]), [0])
    assert tokens.tolist() == [1]


def test_a_row_depends_on_its_own_seed_alone() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    together, _ = drawn_by(logits, [3, 1, 4, 1, 5])
    alone = [drawn_by(logits[row : row + 1], [seed])[0].item() for row, seed in enumerate([3, 1, 4, 1, 5])]
    assert together.tolist() == alone


def test_cut_distributions_are_left_to_vllm() -> None:
    assert drawn_by(torch.zeros(1, 3), [0], k=torch.tensor([1]))[0] == "vLLM's own"
