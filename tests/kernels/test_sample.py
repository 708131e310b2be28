"""cpu_sample against the inverse of the distribution's sum in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.support.kernel_grid import F64
from tests.support.levels import LEVELS, at_level

pytestmark = pytest.mark.native

# The last number below 1 that torch.rand gives.
HIGHEST = 1 - 2**-24


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    with at_level(request.param):
        yield


def sample(logits: Tensor, numbers: list[float] | Tensor) -> tuple[Tensor, Tensor]:
    tokens, logprobs = torch.ops.gadcore.cpu_sample(logits, torch.as_tensor(numbers, dtype=torch.float32))
    return tokens, logprobs


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("sharp", [0.1, 3.0])
def test_against_float64(vocabulary: int, sharp: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = sharp * torch.randn(40, vocabulary, generator=generator)
    logits[:, ::3] = logits[:, ::3].masked_fill(torch.rand(logits[:, ::3].shape, generator=generator) < 0.3, -torch.inf)
    logits[:, vocabulary // 2] = 1.0
    numbers = torch.rand(40, generator=generator)
    numbers[0], numbers[1] = 0.0, HIGHEST
    tokens, logprobs = sample(logits, numbers)
    torch.testing.assert_close(logprobs.to(F64), logits.to(F64).log_softmax(-1), rtol=1e-5, atol=1e-5)
    p = logits.to(F64).softmax(-1)
    sums = p.cumsum(-1)
    assert (p.gather(1, tokens[:, None]) > 0).all()
    # The drawn token's part of the sum holds the number, as far as float32 tells.
    upper = sums.gather(1, tokens[:, None]).flatten()
    lower = upper - p.gather(1, tokens[:, None]).flatten()
    assert (numbers.to(F64) <= upper + 1e-6).all() and (numbers.to(F64) >= lower - 1e-6).all()


@pytest.mark.usefixtures("level")
def test_no_token_of_probability_0_is_drawn() -> None:
    logits = torch.full((3, 4000), -torch.inf)
    logits[:, [5, 1500]] = torch.tensor([0.0, -3.0])
    assert sample(logits, [0.0, 0.9, HIGHEST])[0].tolist() == [5, 5, 1500]


def test_where_rounding_leaves_the_number_above_all_sums_the_last_possible_token_is_drawn() -> None:
    logits = torch.zeros(1, 3 * 1024 + 5)
    logits[:, 2 * 1024 - 3 :] = -torch.inf
    assert sample(logits, [1.0])[0].tolist() == [2 * 1024 - 4]


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    alone, _ = sample(logits[2:], [0.3])
    logits[1, 7] = torch.nan
    tokens, logprobs = sample(logits, [0.1, 0.2, 0.3])
    assert tokens[2] == alone and logprobs[1].isnan().all() and logprobs[[0, 2]].isfinite().all()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    logits, numbers = torch.randn(9, 3000), torch.rand(9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(sample(logits, numbers))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"logits must be contiguous float32 \[M, V\], is Double"):
        sample(torch.zeros(2, 3, dtype=F64), [0.0, 0.0])
    with pytest.raises(RuntimeError, match="logits must be contiguous"):
        sample(torch.zeros(3, 2).t(), [0.0, 0.0])
    with pytest.raises(RuntimeError, match="logits must be contiguous"):
        sample(torch.zeros(2, 0), [0.0, 0.0])
    with pytest.raises(RuntimeError, match=r"numbers must be contiguous float32 \[2\]"):
        sample(torch.zeros(2, 3), [0.0])
