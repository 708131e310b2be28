"""csrc/cuda/bt_score.cu, run by the emulator of simt.h: numbers, bounds, order; and what the emulator itself finds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.kernels import _cuda
from gadcore.kernels.cast_copy import copy_table
from tests.support import bt_problem, cuda_emulation

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def library() -> _cuda.Library:
    return cuda_emulation.library()


@pytest.fixture
def set_seed() -> Iterator[Callable[[int], None]]:
    yield cuda_emulation.set_seed
    cuda_emulation.set_seed(0)


class Canaries(TorchDispatchMode):
    """Every tensor made by torch.empty or new_empty lies between canaries, and holds NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.new_empty) or out.dtype.itemsize > 4:
            return out
        # 256 bytes or more, so that the tensor lies as torch's own allocations do.
        border = 256
        buffer = torch.full((out.numel() + 2 * border,), torch.nan, dtype=out.dtype)
        buffer[:border] = buffer[-border:] = 77
        self.buffers.append((buffer, border))
        return buffer[border:-border].view(out.shape)

    def check(self) -> None:
        assert self.buffers
        for buffer, border in self.buffers:
            assert (buffer[:border] == 77).all() and (buffer[-border:] == 77).all()


@contextmanager
def canaries() -> Iterator[None]:
    with Canaries() as mode:
        yield
    mode.check()


def check(library: _cuda.Library, arguments: bt_problem.Arguments) -> None:
    with canaries():
        bt_problem.check(library.bt_forward, library.bt_backward, arguments)


@pytest.mark.parametrize("dtype", bt_problem.DTYPES)
@pytest.mark.parametrize("width", [1, 17, 96, 1032])
def test_against_fp64(library: _cuda.Library, width: int, dtype: torch.dtype) -> None:
    check(library, bt_problem.ragged(width, dtype))


@pytest.mark.parametrize("samples", range(1, 17))
def test_group_sizes(library: _cuda.Library, samples: int) -> None:
    check(library, bt_problem.problem([1 + samples] * 2, [True, False], 40, torch.bfloat16, seed=samples))


def test_more_sequences_than_threads(library: _cuda.Library) -> None:
    check(library, bt_problem.problem([140] * 4, [True] * 4, 24, torch.float32, tokens=40))


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_no_sequences(library: _cuda.Library, sizes: list[int]) -> None:
    check(library, bt_problem.problem(sizes, [True] * len(sizes), 24, torch.float32))


def test_without_bias_and_with_heads_of_other_dtypes(library: _cuda.Library) -> None:
    arguments = bt_problem.problem([4, 3], [True, True], 72, torch.bfloat16)
    check(library, {**arguments, "bias": None})
    check(library, {**arguments, "weight": arguments["weight"].half(), "bias": arguments["bias"].bfloat16()})


@pytest.mark.parametrize("layout", bt_problem.LAYOUTS)
@pytest.mark.parametrize("dtype", bt_problem.DTYPES)
def test_strides(library: _cuda.Library, layout: str, dtype: torch.dtype) -> None:
    """Rows at multiples of 16 bytes are read by vectors, the others by elements: a misaligned vector is an error."""
    check(library, bt_problem.strided(layout, dtype))


def test_equal_rows_score_equally_to_the_bit(library: _cuda.Library) -> None:
    bt_problem.check_equal_rows(library.bt_forward, bt_problem.equal_rows(torch.bfloat16))


def test_large_margins(library: _cuda.Library) -> None:
    bt_problem.check_large_margins(library.bt_forward, bt_problem.large_margins())


@pytest.mark.parametrize("dtype", bt_problem.DTYPES)
def test_rows_without_a_sequence_are_zero(library: _cuda.Library, dtype: torch.dtype) -> None:
    with canaries():
        bt_problem.check_untouched_rows(library.bt_backward, dtype)


def test_order_of_blocks_and_threads_changes_no_bit(library: _cuda.Library, set_seed: Callable[[int], None]) -> None:
    """Also of the loss, which another block sums then; and a second launch finds the count of blocks at 0 again."""
    arguments = bt_problem.problem([3] * 80 + [20], [True] * 81, 72, torch.bfloat16, tokens=60)

    def run() -> list[Tensor]:
        backward = library.bt_backward(bt_problem.grad_scores(arguments), *bt_problem.operands(arguments))
        return [*library.bt_forward(**arguments), *backward]

    first = run()
    for seed in (0, 1, 2, 3):
        set_seed(seed)
        for got, expected in zip(run(), first, strict=True):
            assert torch.equal(got, expected)


# --- the emulator ----------------------------------------------------------------------------------------------------

BROKEN = r"""
#include "device.cuh"

__global__ void half_a_block() { if (threadIdx.x < 32) __syncthreads(); }
__global__ void half_a_warp(float* x) { if (threadIdx.x < 16) x[threadIdx.x] = gadcore::warp_sum(1.0f); }
__global__ void misaligned(float* x) { gadcore::store(x, gadcore::load<4>(x + 1)); }
__global__ void missing_barrier(float* x) {
  __shared__ float shared[64];
  shared[threadIdx.x] = blockIdx.x;
  x[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void block_order(float* x) { *x = blockIdx.x; }

GADCORE_EXPORT int run(int which, float* x) {
  switch (which) {
    case 0: GADCORE_LAUNCH((half_a_block), 1, 64, nullptr); break;
    case 1: GADCORE_LAUNCH((half_a_warp), 1, 32, nullptr, x); break;
    case 2: GADCORE_LAUNCH((misaligned), 1, 1, nullptr, x); break;
    case 3: GADCORE_LAUNCH((missing_barrier), 4, 64, nullptr, x); break;
    case 4: GADCORE_LAUNCH((block_order), 9, 1, nullptr, x); break;
  }
  return cudaGetLastError();
}
GADCORE_EXPORT void set_seed(uint64_t seed) { simt::seed = seed; }
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cu").write_text(BROKEN)
    cuda_emulation.build_module().compile_emulated([folder / "broken.cu"], folder / "broken.so")
    library = ctypes.CDLL(str(folder / "broken.so"))
    library.run.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.set_seed.argtypes = [ctypes.c_uint64]
    return library


@pytest.mark.parametrize(("kernel", "error"), [(0, 10001), (1, 10002), (2, 716)])
def test_emulator_reports_what_a_gpu_would_not_survive(broken: ctypes.CDLL, kernel: int, error: int) -> None:
    x = torch.zeros(64)
    assert broken.run(kernel, x.data_ptr()) == error
    assert broken.run(4, x.data_ptr()) == 0, "an error ends with the launch that made it"


def test_emulator_shows_missing_barriers_and_the_order_of_blocks(broken: ctypes.CDLL) -> None:
    def results(kernel: int) -> list[Tensor]:
        found = []
        for seed in range(5):
            broken.set_seed(seed)
            x = torch.zeros(256)
            assert broken.run(kernel, x.data_ptr()) == 0
            found.append(x)
        return found

    for kernel in (3, 4):
        first, *others = results(kernel)
        assert any(not torch.equal(first, other) for other in others)


def test_a_failed_launch_raises(library: _cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library._functions, "cast_copy", lambda *_: 716)
    with pytest.raises(RuntimeError, match=r"cast_copy could not be launched: misaligned address \(error 716\)"):
        library.cast_copy(copy_table([(torch.zeros(3), torch.zeros(3))]))
