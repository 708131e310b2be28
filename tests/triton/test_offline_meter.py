"""The meter and its model, on launches whose bytes can be counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

import bench.offline.interpreter as interpreter
from bench.offline import traffic_suite
from bench.offline.as_cuda import as_cuda
from bench.offline.meter import Cache, Traffic, metered

BF16 = torch.bfloat16


@triton.jit
def read_all(x, out, n, step, BLOCK: tl.constexpr):
    """Every program loads all of x, a block at a time, and stores one number."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        total += tl.load(x + rows * step, mask=rows < n, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def store_then_load(x, n, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        tl.store(x + first + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.float32))
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        tl.store(x + rows, tl.load(x + rows) + 1)


@triton.jit
def product(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def add_one(x, out, N: tl.constexpr):
    rows = tl.arange(0, N)
    tl.store(out + rows, tl.load(x + rows) + 1)


def metered_launch(call: Callable[[], object], cache: Cache | None = None) -> Traffic:
    with metered(cache) as meter:
        call()
    (row,) = meter.rows
    return row


@pytest.mark.parametrize(("step", "sectors"), [(1, 100 * 4 // 32 + 1), (2, 100 * 8 // 32), (8, 100)])
def test_bytes_of_a_load(step: int, sectors: int) -> None:
    # 64 bytes apart from anything else, so that sectors are easy to count.
    x, out = aligned(128 * step), aligned(100)
    row = metered_launch(lambda: read_all[(3,)](x, out, 100, step, BLOCK=128))
    assert (row.kernel, row.programs) == ("read_all", 3)
    assert row.requested_load == 3 * 100 * 4 and row.requested_store == 3 * 4
    assert row.sector_load == 3 * sectors * 32 and row.sector_store == 3 * 32
    assert row.unique_load == sectors * 32 and row.unique_store == 32
    assert (row.modelled_load, row.modelled_store) == (row.unique_load, row.unique_store)


def aligned(elements: int) -> torch.Tensor:
    raw = torch.zeros(elements + 16)
    return raw[-(raw.data_ptr() // 4) % 16 :][:elements]


def test_flops_of_a_dot() -> None:
    a, b, out = torch.randn(16, 64), torch.randn(64, 32), torch.empty(16, 32)
    row = metered_launch(lambda: product[(1,)](a, b, out, M=16, K=64, N=32, PRECISION="ieee"))
    assert row.flops == 2 * 16 * 64 * 32
    assert row.unique_load == a.nbytes + b.nbytes and row.unique_store == out.nbytes


@pytest.mark.parametrize(
    ("capacity", "multiprocessors", "passes"),
    [
        (64 << 10, 1, 1),  # all of x stays in the cache
        (16 << 10, 1, 4),  # one program after the other reads all of it anew
        (16 << 10, 2, 2),  # two at once share what they read
        (16 << 10, 4, 1),
    ],
)
def test_modelled_bytes(capacity: int, multiprocessors: int, passes: int) -> None:
    x, out = aligned(8192), aligned(4)
    row = metered_launch(
        lambda: read_all[(4,)](x, out, 8192, 1, BLOCK=256), Cache(bytes=capacity, multiprocessors=multiprocessors)
    )
    assert row.unique_load == x.nbytes and row.modelled_load == passes * x.nbytes
    # Only programs that run at the same time write their numbers back as one sector.
    assert row.modelled_store == passes * 32


@pytest.mark.parametrize(("capacity", "loaded", "stored"), [(64 << 10, 0, 1), (16 << 10, 1, 2)])
def test_modelled_cache_keeps_stores_until_they_are_pushed_out(capacity: int, loaded: int, stored: int) -> None:
    x = aligned(8192)
    row = metered_launch(lambda: store_then_load[(1,)](x, 8192, BLOCK=256), Cache(bytes=capacity))
    assert (x == 2).all()
    assert row.unique_load == row.unique_store == x.nbytes and row.sector_store == 2 * x.nbytes
    assert (row.modelled_load, row.modelled_store) == (loaded * x.nbytes, stored * x.nbytes)


def test_resident_programs_run_together() -> None:
    x, out = aligned(8192), aligned(4)
    cache = Cache(bytes=16 << 10, multiprocessors=1, resident={"read_all": 4})
    row = metered_launch(lambda: read_all[(4,)](x, out, 8192, 1, BLOCK=256), cache)
    assert row.modelled_load == x.nbytes


def test_aten_operators_count_with_their_least() -> None:
    a, b, out = torch.randn(4, 8).to(BF16), torch.randn(8, 16).to(BF16), torch.zeros(4, 16)
    with metered() as meter:
        narrow = a @ b
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=0, out=out)
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=2.0, out=out)
        torch.mm(a, b, out=torch.empty(4, 16, dtype=BF16))
        out.view(2, 32)[:1].t()
        out.add_(1)
        out.zero_()
    least = a.nbytes + b.nbytes
    assert [(row.kernel, row.unique_load, row.unique_store, row.flops) for row in meter.rows] == [
        ("aten.mm", least, narrow.nbytes, 1024),
        ("aten.addmm", least, out.nbytes, 1024),
        ("aten.addmm", least + out.nbytes, out.nbytes, 1024),
        ("aten.mm", least, narrow.nbytes, 1024),
        ("aten.add_", out.nbytes, out.nbytes, 0),
        ("aten.zero_", 0, out.nbytes, 0),
    ]
    exact = a.float() @ b.float()
    torch.testing.assert_close(narrow, exact.to(BF16))


def test_products_of_the_meter_are_right() -> None:
    a, b, out = torch.randn(4, 8).to(BF16), torch.randn(8, 16).to(BF16), torch.full((4, 16), math.nan)
    with metered():
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=0, out=out)
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=2.0, out=out)
    torch.testing.assert_close(out, 3 * (a.float() @ b.float()))


def test_addresses_alone() -> None:
    x, out = torch.ones(256), torch.empty(1)
    with interpreter.addresses_only():
        row = metered_launch(lambda: read_all[(1,)](x, out, 256, 1, BLOCK=256))
    assert row.requested_load == x.nbytes and out.item() == 0
    read_all[(1,)](x, out, 256, 1, BLOCK=256)
    assert out.item() == 256


def test_code_for_cuda_takes_its_way_on_the_cpu() -> None:
    x = torch.zeros(4)
    with as_cuda("cpu"):
        assert x.device.type == "cuda" and x.is_cuda
        y = torch.ones(4, device=x.device)
        assert torch.cuda.get_device_capability(x.device) == (9, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        add_one[(1,)](y, x, N=4)
    assert x.device.type == y.device.type == "cpu" and not x.is_cuda and x.tolist() == [2] * 4


@pytest.mark.slow
def test_the_suite_on_small_shapes() -> None:
    rows = traffic_suite.run(quick=True)
    whole = [row for row in rows if row["kernel"] == "all"]
    ours = {row["op"]: row for row in whole if row["impl"] == "triton"}
    assert all(row["gate"] == "pass" for row in ours.values()), ours
    assert {row["op"] for row in ours.values() if row["limit"]} == {
        "linear_logprob forward",
        "linear_logprob forward on production's grid",
        "prefix_attention forward",
        "bt_score forward",
        "bt_score backward",
        "grpo_ratio_loss",
    }
    for row in whole:
        parts = [part for part in rows if part is not row and (part["op"], part["impl"]) == (row["op"], row["impl"])]
        assert sum(part["unique_MB"] for part in parts) == pytest.approx(row["unique_MB"])
        assert row["unique_over_minimum"] >= 0.999
        if row["impl"] != "triton":
            assert row["unique_over_ours"] == pytest.approx(row["unique_MB"] / ours[row["op"]]["unique_MB"])
