"""The CUDA C++ ops on a GPU: numbers against fp64, agreement with Triton, streams, graphs, and copies of real size."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from gadcore.kernels import _cuda
from gadcore.kernels.cast_copy import CastCopy, cast_copy
from tests.support import bt_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_cuda.why_missing("cast_copy") is not None, reason=str(_cuda.why_missing("cast_copy"))),
]


def on_gpu(value: Any) -> Any:
    """A tensor with the same strides and alignment on the GPU; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).cuda()
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def moved(function: Any) -> Any:
    """The function on the GPU, from and to the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        results = function(*map(on_gpu, args), **{name: on_gpu(value) for name, value in kwargs.items()})
        return [result.cpu() for result in results]

    return call


def check(arguments: bt_problem.Arguments) -> None:
    library = _cuda.require("bt_forward")
    bt_problem.check(moved(library.bt_forward), moved(library.bt_backward), arguments)


@pytest.mark.parametrize("dtype", bt_problem.DTYPES)
@pytest.mark.parametrize("width", [1, 17, 96, 1032, 5120])
def test_bt_against_fp64(width: int, dtype: torch.dtype) -> None:
    check(bt_problem.ragged(width, dtype))


@pytest.mark.parametrize("layout", bt_problem.LAYOUTS)
@pytest.mark.parametrize("dtype", bt_problem.DTYPES)
def test_bt_strides(layout: str, dtype: torch.dtype) -> None:
    check(bt_problem.strided(layout, dtype))


def test_bt_edges() -> None:
    library = _cuda.require("bt_forward")
    bt_problem.check_equal_rows(moved(library.bt_forward), bt_problem.equal_rows(torch.bfloat16))
    bt_problem.check_large_margins(moved(library.bt_forward), bt_problem.large_margins())
    bt_problem.check_untouched_rows(moved(library.bt_backward), torch.bfloat16)
    for sizes in ([], [0], [0, 0]):
        check(bt_problem.problem(sizes, [True] * len(sizes), 24, torch.float32))


def test_bt_agrees_with_triton_and_with_itself() -> None:
    """The same scores up to the order of sums; the same bits on every run, the loss of many blocks included."""
    bt_triton = pytest.importorskip("gadcore.kernels.bt_triton")
    library = _cuda.require("bt_forward")
    problem = bt_problem.problem([9] * 300, [True] * 300, 3584, torch.bfloat16, tokens=12288)
    arguments = {name: on_gpu(value) for name, value in problem.items()}
    grad = on_gpu(bt_problem.grad_scores(problem))

    def run() -> list[Tensor]:
        return [*library.bt_forward(**arguments), *library.bt_backward(grad, *bt_problem.operands(arguments))]

    first = run()
    for _ in range(5):
        assert all(torch.equal(got, expected) for got, expected in zip(run(), first, strict=True))
    *forward, loss, d_hidden, d_weight, d_bias = first
    for got, expected in zip(forward, bt_triton.forward(**arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, forward[1].double().sum().float(), rtol=1e-5, atol=0)
    by_triton = bt_triton.backward(grad, *bt_problem.operands(arguments))
    for got, expected in zip((d_hidden, d_weight, d_bias), by_triton, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


def test_bt_writes_beyond_2_to_the_31_elements() -> None:
    tokens, width = 2**20 + 17, 2048
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("less than 10 GiB of GPU memory is free")
    hidden = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    hidden[-1] = 2
    last_index = torch.tensor([tokens - 1, 3], device="cuda")
    weight = torch.randn(width, device="cuda")
    grad = torch.tensor([2.0, 4.0], device="cuda")
    d_hidden, d_weight, _ = _cuda.require("bt_backward").bt_backward(grad, hidden, last_index, weight)
    assert torch.equal(d_hidden[-1], (2 * weight).bfloat16()) and torch.equal(d_hidden[3], (4 * weight).bfloat16())
    assert torch.count_nonzero(d_hidden[4:-1]) == 0 and torch.count_nonzero(d_hidden[:3]) == 0
    assert (d_weight == 4).all()


def test_streams_have_counts_of_their_own() -> None:
    """Launches on two streams may run at the same time."""
    library = _cuda.require("bt_forward")
    arguments = {n: on_gpu(v) for n, v in bt_problem.problem([9] * 200, [True] * 200, 512, torch.bfloat16).items()}
    expected = library.bt_forward(**arguments).loss
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    losses = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            losses.append(library.bt_forward(**arguments).loss)
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for loss in losses)


def test_cast_copy_of_a_layer_and_in_a_graph() -> None:
    """Shards of fp32 weights into slices of fused bf16 tensors, launched, and replayed with new values."""
    fused = torch.full((3 * 1024, 2048), torch.nan, dtype=torch.bfloat16, device="cuda")
    norm = torch.full((2051,), torch.nan, dtype=torch.float16, device="cuda")
    sources = [torch.randn(1024, 1024, device="cuda") for _ in range(6)] + [torch.randn(2050, device="cuda")]
    targets = [fused[r : r + 1024, c : c + 1024] for r in (0, 1024, 2048) for c in (0, 1024)] + [norm[1:]]
    copies = CastCopy(list(zip(sources, targets, strict=True)))
    assert copies.impl == "cuda"
    copies()
    assert all(torch.equal(target, source.to(target.dtype)) for source, target in copies.pairs)
    assert norm[0].isnan()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copies()
    for source in sources:
        source.neg_()
    graph.replay()
    assert all(torch.equal(target, source.to(target.dtype)) for source, target in copies.pairs)


def test_cast_copy_needs_a_gpu_for_its_tensors() -> None:
    with pytest.raises(ValueError, match='impl="cuda" needs tensors on a GPU, got cpu'):
        cast_copy([(torch.zeros(2), torch.zeros(2))], impl="cuda")


def test_a_second_gpu_gets_the_launch() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    source, target = torch.randn(1000, device="cuda:1"), torch.zeros(1000, dtype=torch.bfloat16, device="cuda:1")
    cast_copy([(source, target)], impl="cuda")
    assert torch.equal(target, source.bfloat16())
