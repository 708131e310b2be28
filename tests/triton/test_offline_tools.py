"""The tools that the other tests here rely on: each must find what it claims to find, and keep quiet otherwise."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

import bench.offline.interpreter as interpreter
from bench.offline.guard import DuplicateStore, OutOfBounds, RaceError
from bench.offline.guard import guarded as guard_launches
from bench.offline.numerics import round_to_tf32

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
ignore_block_pointers_are_old = pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")


@triton.jit
def scale(x, out, n, step, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    values = tl.load(x + rows * step, mask=inside, other=0.0) if MASK_LOAD else tl.load(x + rows * step)
    if MASK_STORE:
        tl.store(out + rows, values * 2, mask=inside)
    else:
        tl.store(out + rows, values * 2)


@triton.jit
def accumulate(x, total):
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))


@triton.jit
def count_atomically(total):
    tl.atomic_add(total, 1.0)


@triton.jit
def shift(x, n, BLOCK: tl.constexpr):
    """In place: the last element that a program loads is the first that the next one stores."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + rows, tl.load(x + rows + 1, mask=rows + 1 < n, other=0.0), mask=rows < n)


@triton.jit
def store_to_half(out, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(out + rows // 2, rows.to(tl.float32))


@triton.jit
def sum_masked(x, out, n, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + rows, mask=rows < n), 0))


@triton.jit
def store_order(order, counter):
    seen = tl.atomic_add(counter, 1)
    tl.store(order + tl.program_id(0) + 2 * tl.program_id(1), seen)


@triton.jit
def copy_block(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr):
    source = tl.make_block_ptr(x, (rows, columns), (columns, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    target = tl.make_block_ptr(out, (rows, columns), (columns, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    tl.store(target, tl.load(source, boundary_check=CHECK), boundary_check=(0, 1))


@triton.jit
def copy_described(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    out.store([0, 0], x.load([0, 0]))


@triton.jit
def product(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def arithmetic(x, y, out, flags, N: tl.constexpr):
    rows = tl.arange(0, N)
    a, b = tl.load(x + rows), tl.load(y + rows)
    tl.store(out + rows, a + b)
    tl.store(out + N + rows, a * b)
    tl.store(out + 2 * N + rows, tl.maximum(a, b))
    tl.store(out + 3 * N + rows, -a)
    tl.store(out + 4 * N + rows, tl.cumsum(a, 0))
    tl.store(out + 5 * N + rows, tl.full([N], 1.5, tl.bfloat16) + tl.zeros([N], tl.bfloat16))
    tl.store(out + 6 * N + rows, rows.to(tl.bfloat16))
    tl.store(flags + rows, (a < b).to(tl.int32))
    tl.store(flags + N, tl.sum(a, 0).to(tl.int32))
    tl.store(flags + N + 1, tl.max(a, 0).to(tl.int32))


@triton.jit
def round_to(x, out, N: tl.constexpr):
    rows = tl.arange(0, N)
    tl.store(out + rows, tl.load(x + rows).to(out.dtype.element_ty))


@triton.jit
def larger(x, y, out, N: tl.constexpr):
    rows = tl.arange(0, N)
    tl.store(out + rows, tl.maximum(tl.load(x + rows), tl.load(y + rows)))


@triton.jit
def hyperbolic_tangent(x, out, N: tl.constexpr):
    rows = tl.arange(0, N)
    tl.store(out + rows, libdevice.tanh(tl.load(x + rows)))


# --- the guard -------------------------------------------------------------------------------------------------------


def test_a_right_kernel_passes(guarded) -> None:
    x, out = torch.randn(100), torch.empty(100)
    scale[(2,)](x, out, 100, 1, BLOCK=64, MASK_LOAD=True, MASK_STORE=True)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("masks", [(True, False), (False, True)])
def test_one_lane_out_of_bounds(masks: tuple[bool, bool]) -> None:
    x, out = torch.randn(127), torch.empty(127)
    with pytest.raises(OutOfBounds, match=r"scale, program \(1, 0, 0\)"), guard_launches():
        scale[(2,)](x, out, 127, 1, BLOCK=64, MASK_LOAD=masks[0], MASK_STORE=masks[1])


def test_a_view_is_guarded_and_not_its_storage() -> None:
    whole = torch.randn(256)
    with pytest.raises(OutOfBounds), guard_launches():
        scale[(2,)](whole[:127], torch.empty(128), 127, 1, BLOCK=64, MASK_LOAD=False, MASK_STORE=True)


def test_gaps_of_a_strided_view_are_out_of_bounds() -> None:
    whole, out = torch.randn(128), torch.empty(64)
    with guard_launches():
        scale[(1,)](whole[::2], out, 64, 2, BLOCK=64, MASK_LOAD=True, MASK_STORE=True)
    assert torch.equal(out, 2 * whole[::2])
    with pytest.raises(OutOfBounds), guard_launches():
        scale[(1,)](whole[::2], out, 64, 1, BLOCK=64, MASK_LOAD=True, MASK_STORE=True)


def test_two_views_of_one_storage_with_different_types(guarded) -> None:
    raw = torch.zeros(600, dtype=torch.uint8)
    x, out = raw[:256].view(torch.float32), raw[300:556].view(torch.float32)
    x.fill_(3)
    scale[(1,)](x, out, 64, 1, BLOCK=64, MASK_LOAD=True, MASK_STORE=True)
    assert (out == 6).all() and not raw[256:300].any()


def test_accumulating_without_atomics_is_a_race() -> None:
    with pytest.raises(RaceError, match="accumulate"), guard_launches():
        accumulate[(2,)](torch.ones(2), torch.zeros(1))
    with guard_launches():
        accumulate[(1,)](torch.ones(1), torch.zeros(1))


def test_atomics_race_with_plain_accesses_only(guarded) -> None:
    total = torch.zeros(1)
    count_atomically[(5,)](total)
    assert total.item() == 5


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_load_races_with_a_store_whichever_runs_first(seed: int) -> None:
    with pytest.raises(RaceError), guard_launches(), interpreter.shuffled(seed):
        shift[(2,)](torch.randn(128), 128, BLOCK=64)
    with guard_launches():
        shift[(1,)](torch.randn(64), 64, BLOCK=64)


def test_launches_do_not_race_with_each_other(guarded) -> None:
    total = torch.zeros(1)
    accumulate[(1,)](torch.ones(1), total)
    accumulate[(1,)](torch.ones(1), total)
    assert total.item() == 2


def test_doubled_store() -> None:
    with pytest.raises(DuplicateStore, match="32 of 64 lanes"), guard_launches():
        store_to_half[(1,)](torch.empty(64), BLOCK=64)


def test_masked_lanes_without_other_are_undefined() -> None:
    x, out = torch.ones(64), torch.empty(1)
    sum_masked[(1,)](x, out, 40, BLOCK=64)
    assert out.item() == 40
    with guard_launches():
        sum_masked[(1,)](x, out, 40, BLOCK=64)
    assert out.isnan().all()
    with guard_launches(poison=False):
        sum_masked[(1,)](x, out, 40, BLOCK=64)
    assert out.item() == 40


@ignore_block_pointers_are_old
def test_block_pointers_and_descriptors(guarded) -> None:
    x, out = torch.randn(3, 20), torch.empty(3, 20)
    copy_block[(1,)](x, out, 3, 20, ROWS=4, COLUMNS=32, CHECK=(0, 1))
    assert torch.equal(x, out)
    out.fill_(math.nan)
    descriptors = [TensorDescriptor.from_tensor(tensor, [4, 32]) for tensor in (x, out)]
    copy_described[(1,)](*descriptors, ROWS=4, COLUMNS=32)
    assert torch.equal(x, out)


@ignore_block_pointers_are_old
def test_block_pointer_without_its_boundary_check() -> None:
    with pytest.raises(OutOfBounds, match="load"), guard_launches():
        copy_block[(1,)](torch.randn(3, 32), torch.empty(3, 32), 3, 32, ROWS=4, COLUMNS=32, CHECK=(1,))


def test_storage_of_more_than_2_31_elements(guarded) -> None:
    # Never filled: only the pages that the kernel touches take memory.
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(2**31 + 64, dtype=torch.int8)
    x = storage.as_strided((2,), (2**31,))
    x.fill_(21)
    out = torch.empty(2, dtype=torch.int8)
    scale[(1,)](x, out, 2, 2**31, BLOCK=2, MASK_LOAD=True, MASK_STORE=True)
    assert out.tolist() == [42, 42]


def test_a_32_bit_offset_that_overflows_is_out_of_bounds() -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.empty(2**31 + 64, dtype=torch.int8).as_strided((5,), (2**29,))
    out = torch.empty(5, dtype=torch.int8)
    with pytest.raises(OutOfBounds), guard_launches():
        scale[(1,)](x, out, 5, 2**29, BLOCK=8, MASK_LOAD=True, MASK_STORE=True)


# --- the order of programs -------------------------------------------------------------------------------------------


def ranks(grid: tuple[int, ...]) -> list[int]:
    order = torch.empty(math.prod(grid), dtype=torch.int32)
    store_order[grid](order, torch.zeros(1, dtype=torch.int32))
    return order.tolist()


def test_programs_run_as_a_gpu_launches_them() -> None:
    assert ranks((2, 3)) == [0, 1, 2, 3, 4, 5]


def test_shuffled_programs_each_run_once(shuffled_programs) -> None:
    with shuffled_programs(0):
        first = ranks((2, 16))
    with shuffled_programs(0):
        again = ranks((2, 16))
    with shuffled_programs(1):
        other = ranks((2, 16))
    assert sorted(first) == list(range(32)) and first == again != other and first != list(range(32))
    assert ranks((2, 3)) == list(range(6))


def test_an_order_that_leaves_a_program_out_is_refused() -> None:
    with pytest.raises(ValueError, match="no permutation"), interpreter.program_order(np.zeros):
        ranks((2, 2))


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40])
    x = torch.cat([special, torch.randn(1024 - len(special)) * 100])
    out = torch.empty(1024, dtype=BF16)
    round_to[(1,)](x, out, N=1024)
    torch.testing.assert_close(out, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(1024)
    round_to[(1,)](out, back, N=1024)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_arithmetic() -> None:
    n = 64
    x, y = torch.randn(n, dtype=BF16), torch.randn(n, dtype=BF16)
    out, flags = torch.empty(7, n, dtype=BF16), torch.empty(n + 2, dtype=torch.int32)
    arithmetic[(1,)](x, y, out, flags, N=n)
    expected = [x + y, x * y, torch.maximum(x, y), -x, None, torch.full((n,), 1.5), torch.arange(n)]
    for row, value in zip(out, expected, strict=True):
        assert value is None or torch.equal(row, value.to(BF16))
    assert torch.equal(out[4], x.float().cumsum(0).to(BF16))
    assert torch.equal(flags[:n], (x < y).int())
    assert flags[n] == int(x.float().sum().to(BF16)) and flags[n + 1] == int(x.max())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_dot_of_halves(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype), torch.empty(16, 32)
    product[(1,)](a, b, out, M=16, K=64, N=32, PRECISION=None)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_dot_of_floats_is_as_exact_as_asked_for() -> None:
    a, b, out = torch.randn(16, 64), torch.randn(64, 32), torch.empty(16, 32)
    exact = (a.double() @ b.double()).float()
    errors = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        product[(1,)](a, b, out, M=16, K=64, N=32, PRECISION=precision)
        errors[precision] = ((out - exact).norm() / exact.norm()).item()
    assert errors["ieee"] < 1e-6 and errors["tf32x3"] < 1e-6
    assert 1e-4 < errors["tf32"] < 1e-3


def test_tf32_keeps_ten_bits_and_what_is_not_finite() -> None:
    values = np.array([1 + 2**-11, 1 + 2**-12, -(1 + 2**-11), np.inf, np.nan, 0], dtype=np.float32)
    expected = np.array([1 + 2**-10, 1, -(1 + 2**-10), np.inf, np.nan, 0], dtype=np.float32)
    np.testing.assert_array_equal(round_to_tf32(values), expected)


def test_maximum_drops_nan_like_a_gpu() -> None:
    x, y, out = torch.tensor([math.nan, 1.0]), torch.tensor([2.0, math.nan]), torch.empty(2)
    larger[(1,)](x, y, out, N=2)
    assert out.tolist() == [2, 1]


def test_libdevice() -> None:
    x, out = torch.randn(32), torch.empty(32)
    hyperbolic_tangent[(1,)](x, out, N=32)
    torch.testing.assert_close(out, x.tanh())
    with pytest.raises(Exception, match="libdevice functions take fp32 or fp64"):
        hyperbolic_tangent[(1,)](x.to(BF16), out, N=32)


# --- what the interpreter refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"TRITON_INTERPRET": "0"}, "", "TRITON_INTERPRET=1"),
        ({"OPENBLAS_NUM_THREADS": "2"}, "import numpy", "OPENBLAS_NUM_THREADS=1"),
        ({}, "import liger_kernel.ops.cross_entropy", "import bench.offline.interpreter before liger_kernel"),
        ({"TRITON_INTERPRET": "0"}, "import triton, os; os.environ['TRITON_INTERPRET'] = '1'", "triton was imported"),
    ],
)
def test_refuses_a_process_in_which_it_would_be_wrong(environment: dict[str, str], code: str, message: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport bench.offline.interpreter"],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and message in process.stderr
