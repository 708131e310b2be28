"""Log-probabilities out of hidden states: formulas, chunks, ignored tokens, entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gadcore.kernels import linear_logprob as module
from gadcore.kernels.linear_logprob import linear_logprob
from tests.support.grid_checks import check_linear_logprob
from tests.support.kernel_grid import HEAD_CASES

F64 = torch.float64
CHUNK, HIDDEN, VOCAB = 4, 3, 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", CHUNK)


def inputs(tokens: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, all of them leaves with a gradient, and targets."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_() for shape in shapes
    )
    return hidden, weight, bias, torch.randint(VOCAB, (tokens,), generator=generator)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def literal(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float) -> list[float]:
    result = []
    for h, y in zip(hidden, targets.tolist(), strict=True):
        z = [(dot(w, h) + (0.0 if bias is None else bias[v].item())) / temperature for v, w in enumerate(weight)]
        result.append(0.0 if y == -100 else z[y] - math.log(sum(map(math.exp, z))))
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.8, 2.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_against_the_formula_at_every_chunk_border(tokens: int, with_bias: bool, temperature: float) -> None:
    hidden, weight, bias, targets = inputs(tokens)
    chosen = bias if with_bias else None
    logprob = linear_logprob(hidden, weight, targets, bias=chosen, temperature=temperature)
    assert logprob.shape == (tokens,) and logprob.dtype == F64
    assert logprob.tolist() == pytest.approx(literal(hidden, weight, chosen, targets, temperature), rel=1e-12)


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 1])
def test_gradcheck(tokens: int) -> None:
    hidden, weight, bias, targets = inputs(tokens)
    if tokens > 1:
        targets[tokens // 2] = -100

    def logprobs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_logprob(h, w, targets, bias=b, temperature=0.8)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_ignored_targets_have_logprob_zero_and_no_gradient() -> None:
    tokens, ignored = 2 * CHUNK + 1, [0, 3, 4, 5, 6, 7]  # one whole chunk among them
    hidden, weight, bias, targets = inputs(tokens)
    kept = [i for i in range(tokens) if i not in ignored]
    alone = linear_logprob(hidden[kept], weight, targets[kept], bias=bias)
    expected = torch.autograd.grad(alone.sum(), (hidden, weight, bias))
    targets[ignored] = -100
    logprob = linear_logprob(hidden, weight, targets, bias=bias)
    assert logprob[ignored].eq(0).all() and logprob[kept].ne(0).all()
    actual = torch.autograd.grad(logprob.sum(), (hidden, weight, bias))
    assert actual[0][ignored].eq(0).all() and actual[0][kept].ne(0).any(1).all()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("tokens", [1, 2 * CHUNK + 1])
def test_entropy_is_that_of_the_tempered_distribution(tokens: int, temperature: float) -> None:
    hidden, weight, bias, targets = inputs(tokens)
    targets[0] = -100
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, return_entropy=True)
    distribution = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / temperature)
    expected = distribution.entropy().detach()
    expected[0] = 0  # an ignored token
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, expected, rtol=1e-12, atol=1e-14)
    plain = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)
    assert torch.equal(logprob, plain)
    with_entropy = torch.autograd.grad(logprob.sum(), weight, retain_graph=True)
    torch.testing.assert_close(with_entropy, torch.autograd.grad(plain.sum(), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_are_fp32_and_gradients_as_the_inputs(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = inputs(2 * CHUNK + 1, dtype)
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True)
    assert logprob.dtype == entropy.dtype == torch.float32
    gradients = torch.autograd.grad(logprob.sum(), (hidden, weight, bias))
    assert {each.dtype for each in gradients} == {dtype}
    h, w, b = (each.detach().double() for each in (hidden, weight, bias))
    expected = torch.tensor(literal(h, w, b, targets, 1.0), dtype=F64)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logprob.double(), expected, rtol=tolerance, atol=tolerance)
    # Not rounded to bf16 anywhere behind the product.
    assert not torch.equal(logprob.bfloat16().float(), logprob)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    hidden, weight, bias, targets = inputs(3 * CHUNK)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, impl="reference")
    assert kept and (CHUNK, VOCAB) not in kept


def test_without_gradients_nothing_changes() -> None:
    hidden, weight, bias, targets = inputs(2 * CHUNK + 1)
    expected = linear_logprob(hidden, weight, targets, bias=bias)
    with torch.no_grad():
        logprob = linear_logprob(hidden, weight, targets, bias=bias)
    assert not logprob.requires_grad and torch.equal(logprob, expected)


@pytest.mark.native
@pytest.mark.parametrize("wanted", [False, True])
def test_products_of_bfloat16_by_either_way(wanted: bool) -> None:
    """Through float32 copies, and by the product that CPUs with matrix instructions take."""
    choose = torch.ops.gadcore._cpu_bf16_products
    try:
        try:
            choose(wanted)
        except RuntimeError as error:
            pytest.skip(str(error))
        for case in HEAD_CASES[::7]:
            check_linear_logprob(case, "cpu", torch.bfloat16)
    finally:
        choose(None)
