"""prefix_attention against attention over every sequence by itself, in float64: results, gradients, bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gadcore.kernels.dispatch import Impl
from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.prefix_attention import prefix_attention
from tests.support.kernel_grid import F64, RECORD, gradients, pairs, weighted
from tests.support.levels import LEVELS, at_level

F32 = torch.float32
IMPLS = [("reference", F64), ("reference", F32), pytest.param("cpu", F32, marks=pytest.mark.native)]
implementations = pytest.mark.parametrize(("impl", "dtype"), IMPLS)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    heads: tuple[int, int]
    width: int
    window: int | None = None
    sharp: float = 1.0  # factor of the logits

    def __str__(self) -> str:
        groups = "_".join(f"{p}+{'+'.join(map(str, r))}" for p, r in zip(self.prompts, self.responses, strict=True))
        return f"{groups}-{self.heads[0]}of{self.heads[1]}x{self.width}-w{self.window}-{self.sharp}"

    def layout(self) -> PrefixLayout:
        return PrefixLayout.of(self.prompts, self.responses)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return inputs(self.layout().tokens, *self.heads, self.width, dtype, self.sharp)


RAGGED = ((7, 1, 33, 2), ((3, 1, 9), (4,), (), (17, 17, 40)))
# Blocks of keys and rows end inside, at and just before the end of segments.
LONG = ((300, 128, 127), ((150, 5, 128), (129, 1), (257,)))
CASES = [
    *(Case(*RAGGED, heads, width) for heads in ((1, 1), (3, 1), (9, 3), (8, 2)) for width in (16, 64, 80, 128)),
    *(Case(*RAGGED, (4, 2), width) for width in (1, 7, 20, 33)),
    *(Case(*RAGGED, (4, 4), 16, window) for window in (1, 2, 3, 6, 8, 41, 42, 1000)),
    *(Case(*LONG, heads, 64) for heads in ((1, 1), (3, 1), (4, 1), (7, 1))),
    *(Case(*LONG, (3, 1), 16, window) for window in (1, 2, 31, 127, 128, 129, 200, 384)),
    Case((1,), ((),), (1, 1), 64),
    Case((1, 1), ((1, 1), (2,)), (2, 1), 80),
    Case((5,), ((6,),), (130, 1), 8),  # more query heads than a block has rows
    Case(*LONG, (6, 2), 64, None, 12.0),
    Case(*RAGGED, (6, 2), 16, 5, 12.0),
]


def inputs(
    tokens: int, query_heads: int, key_heads: int, width: int, dtype: torch.dtype, sharp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + width)
    query, key, value = (
        torch.randn(tokens, heads, width, generator=generator, dtype=F64)
        for heads in (query_heads, key_heads, key_heads)
    )
    return (query * sharp).to(dtype), key.to(dtype), value.to(dtype)


def leaves_of(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.detach().requires_grad_() for x in tensors)
    return query, key, value


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, window: int | None, scale: float | None = None
) -> Tensor:
    """Each segment as the end of its own causal sequence."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // key.shape[1]
    offsets = layout.offsets.tolist()
    outs = []
    for k, prompt in enumerate(layout.prompt_of.tolist()):
        own = torch.arange(offsets[k], offsets[k + 1])
        seen = own if prompt == k else torch.cat([torch.arange(offsets[prompt], offsets[prompt + 1]), own])
        keys, values = (x[seen].repeat_interleave(shared, 1) for x in (key, value))
        logits = scale * torch.einsum("ihd,jhd->hij", query[own], keys)
        distance = torch.arange(len(seen) - len(own), len(seen))[:, None] - torch.arange(len(seen))
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        outs.append(torch.einsum("hij,jhd->ihd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outs)


def check(case: Case, impl: Impl, dtype: torch.dtype, *given: Tensor) -> None:
    leaves = leaves_of(given)
    layout = case.layout()
    actual = prefix_attention(*leaves, layout, window=case.window, impl=impl)
    assert actual.dtype == dtype and actual.is_contiguous()
    exact = leaves_of(x.to(F64) for x in leaves)
    truth = one_by_one(*exact, layout, case.window)
    loss = weighted(truth)
    RECORD.check(
        "prefix_attention",
        impl,
        dtype,
        [(actual, truth)],
        pairs(gradients(loss(actual), *leaves), gradients(loss(truth), *exact)),
    )


@implementations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, impl: Impl, dtype: torch.dtype) -> None:
    check(case, impl, dtype, *case.inputs(dtype))


@pytest.mark.native
@pytest.mark.parametrize("window", [None, 1800])
def test_a_long_prompt_and_a_long_response(window: int | None) -> None:
    case = Case((2048,), ((1536, 3),), (2, 1), 16, window)
    check(case, "cpu", F32, *case.inputs(F32))


@pytest.mark.native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [20, 64])
def test_every_instruction_set(level: str, width: int) -> None:
    with at_level(level):
        for window in (None, 50):
            case = Case((140, 3), ((37, 1), (131,)), (3, 1), width, window)
            check(case, "cpu", F32, *case.inputs(F32))


@implementations
@pytest.mark.parametrize("kind", ["heads first", "columns", "width apart"])
def test_strided_inputs(kind: str, impl: Impl, dtype: torch.dtype) -> None:
    case = Case(*RAGGED, (6, 2), 20)
    given: tuple[Tensor, ...] = case.inputs(dtype)
    if kind == "heads first":
        given = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in given)
    elif kind == "columns":
        joined = torch.cat([x.flatten(1) for x in given], 1)
        columns = joined.split([x[0].numel() for x in given], 1)
        given = tuple(c.view(x.shape[0], x.shape[1], -1) for c, x in zip(columns, given, strict=True))
    else:
        given = tuple(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in given)
    assert not any(x.is_contiguous() for x in given)
    check(case, impl, dtype, *given)


@implementations
def test_an_upstream_gradient_of_any_strides(impl: Impl, dtype: torch.dtype) -> None:
    case = Case(*RAGGED, (6, 2), 16)
    leaves = leaves_of(case.inputs(dtype))
    out = prefix_attention(*leaves, case.layout(), impl=impl)
    expanded = torch.ones((), dtype=dtype).expand(out.shape)
    transposed = torch.randn(16, 6, out.shape[0], dtype=F64).to(dtype).permute(2, 1, 0)
    for upstream in (expanded, transposed):
        actual = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        expected = torch.autograd.grad(out, leaves, upstream.contiguous(), retain_graph=True)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


@implementations
def test_scale(impl: Impl, dtype: torch.dtype) -> None:
    case = Case(*RAGGED, (2, 1), 16)
    query, key, value = case.inputs(dtype)
    actual = prefix_attention(query, key, value, case.layout(), scale=0.7, impl=impl)
    truth = one_by_one(query.to(F64), key.to(F64), value.to(F64), case.layout(), None, 0.7)
    RECORD.check("prefix_attention", impl, dtype, [(actual, truth)], [])
    assert not torch.equal(actual, prefix_attention(query, key, value, case.layout(), impl=impl))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_gradcheck(window: int | None) -> None:
    layout = PrefixLayout.of([3, 1], [[2, 4], [1]])
    leaves = leaves_of(inputs(layout.tokens, 4, 2, 3, F64))
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, layout, window=window), leaves)


def bits(layout: PrefixLayout, given: list[Tensor], upstream: Tensor, window: int | None = None) -> list[Tensor]:
    """out, d query, d key, d value of the native op."""
    leaves = leaves_of(given)
    out = prefix_attention(*leaves, layout, window=window, impl="cpu")
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.native
@pytest.mark.parametrize(("prompt", "response", "window"), [(150, 37, None), (5, 131, None), (129, 64, 100)])
@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (7, 7)])
def test_a_response_has_the_same_bits_wherever_it_lies(
    prompt: int, response: int, window: int | None, heads: tuple[int, int]
) -> None:
    one = [*inputs(prompt + response, *heads, 20, F32), torch.randn(prompt + response, heads[0], 20)]
    other = [*inputs(41, *heads, 20, F32), torch.randn(41, heads[0], 20)]

    # other: a group of its own (18 + 2 + 3 tokens), then responses of 13 and 5 tokens around the copies.
    def packed(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:23], x[:prompt], x[prompt:], y[23:36], x[prompt:], y[36:], x[prompt:]])

    alone = bits(PrefixLayout.of([prompt], [[response]]), one[:3], one[3], window)
    layout = PrefixLayout.of([18, prompt], [[2, 3], [response, 13, response, 5, response]])
    *given, upstream = [packed(x, y) for x, y in zip(one, other, strict=True)]
    among_others = bits(layout, given, upstream, window)
    begins = [layout.offsets[k].item() for k in (4, 6, 8)]
    for name, expected, actual in zip(("out", "d query", "d key", "d value"), alone, among_others, strict=True):
        for begin in begins:
            assert torch.equal(actual[begin : begin + response], expected[prompt:]), name
    # The prompt itself reads nothing of its responses, and they add up to its gradients.
    assert torch.equal(among_others[0][23 : 23 + prompt], alone[0][:prompt])
    assert torch.equal(among_others[1][23 : 23 + prompt], alone[1][:prompt])
    assert not torch.equal(among_others[2][23 : 23 + prompt], alone[2][:prompt])


# The native op cuts the group of the last case into four parts, some within a response, for every key head.
@pytest.mark.native
@pytest.mark.parametrize(
    "case",
    [Case(*RAGGED, (9, 3), 64), Case(*LONG, (3, 1), 20, 140), Case((300,), ((90, 150, 5, 128),), (9, 3), 64)],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(case: Case) -> None:
    given = list(case.inputs(F32))
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(bits(case.layout(), given, upstream, case.window))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.native
def test_what_the_native_op_refuses() -> None:
    given = inputs(6, 2, 1, 8, F32)
    op = torch.ops.gadcore.cpu_prefix_attention

    def call(offsets: list[int], prompt_of: list[int], *, x: tuple[Tensor, ...] = given, window: int = 0) -> None:
        op(*x, torch.tensor(offsets), torch.tensor(prompt_of), 1.0, window, 6)

    call([0, 2, 6], [0, 0])
    for message, arguments in {
        "offsets must run from 0 to 6": ([0, 2, 5], [0, 0]),
        "segment 1 has no tokens": ([0, 2, 2, 6], [0, 0, 0]),
        "prompt of segment 1 is 2": ([0, 2, 4, 6], [0, 2, 2]),
        "prompt of segment 0 is 1": ([0, 2, 6], [1, 1]),
        "prompt of segment 2 is 0, must be itself or the last": ([0, 2, 4, 6], [0, 1, 0]),
        r"offsets must be int64 \[3\]": ([0, 6], [0, 0]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
    with pytest.raises(RuntimeError, match="query must be float32"):
        call([0, 6], [0], x=tuple(x.double() for x in given))
    with pytest.raises(RuntimeError, match="window must be 0 or more"):
        call([0, 6], [0], window=-1)
    with pytest.raises(RuntimeError, match="2 key heads do not divide 3"):
        call([0, 6], [0], x=inputs(6, 3, 2, 8, F32))


def test_what_does_not_fit_is_refused_by_name() -> None:
    layout = PrefixLayout.of([2], [[4]])
    query, key, value = inputs(6, 2, 1, 8, F32)
    for message, call in {
        r"query must be \[T, Hq, D\]": lambda: prefix_attention(query[0], key, value, layout),
        "Hk a divisor of 2": lambda: prefix_attention(query, key.expand(-1, 3, -1), value.expand(-1, 3, -1), layout),
        "the layout holds 6 tokens, query 5": lambda: prefix_attention(query[:5], key[:5], value[:5], layout),
        "of one dtype": lambda: prefix_attention(query, key, value.double(), layout),
        "window must be 1 or more": lambda: prefix_attention(query, key, value, layout, window=0),
        "computes in torch.float32, got torch.float64": lambda: prefix_attention(
            query.double(), key.double(), value.double(), layout, impl="cpu"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="1 or more tokens"):
        PrefixLayout.of([2], [[0]])
    with pytest.raises(ValueError, match="responses are given for 1 of 2 prompts"):
        PrefixLayout.of([2, 3], [[1]])


def test_positions_go_on_from_the_prompt() -> None:
    layout = PrefixLayout.of([3, 1], [[2, 1], [2]])
    assert layout.offsets.tolist() == [0, 3, 5, 6, 7, 9]
    assert layout.prompt_of.tolist() == [0, 0, 0, 3, 3]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert layout.tokens == 9 and layout.longest == 5
