"""Tiles that were chosen by timing: kept as JSON, another process computes with them, whatever it would have timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gadcore.kernels.tiles import chosen_tiles, use_tiles
from tests.support.importable import make_bench_importable

pytest.importorskip("triton")

import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from gadcore.kernels import tiles as module

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter times nothing", allow_module_level=True)

Launched = list[tuple[str, dict[str, Any]]]


class Gpu:
    """Nothing is compiled: launches are written down, and `seconds` of a tile is what its timing gives."""

    def __init__(self) -> None:
        self.launched: Launched = []
        self.timed: list[str] = []
        self.seconds: Callable[[Any], float] = lambda config: 1.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    make_bench_importable()
    from bench.offline.fakegpu import FakeDriver

    gpu = Gpu()

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        blocks = {name: value for name, value in kwargs.items() if name in ("BM", "BN", "BT", "BV", "BK")}
        gpu.launched.append((function.fn.__name__, blocks | {"num_warps": kwargs.get("num_warps")}))

    def bench(tuner: Autotuner, *args: Any, config: Any, **meta: Any) -> float:
        gpu.timed.append(tuner.base_fn.__name__)
        return gpu.seconds(config)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(Autotuner, "_bench", bench)
    # vLLM lets Triton keep timings on the disk, for the whole process that it was once started in.
    monkeypatch.setattr(triton.knobs.autotuning, "cache", False)
    monkeypatch.setattr(
        triton.runtime.driver, "_active", FakeDriver(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    )
    forget()
    yield gpu
    forget()


def forget() -> None:
    """As a new process."""
    for _, tuner in module._tuners(imported_only=False):
        tuner.cache.clear()


def call() -> None:
    from gadcore.kernels.triton import linear_logprob, prefix_attention

    def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    layout = meta(3, dtype=torch.int64), meta(2, dtype=torch.int64)
    prefix_attention.forward(meta(40, 4, 128), meta(40, 2, 128), meta(40, 2, 128), *layout, 0.1, 0, 40, 1, 10)
    linear_logprob.forward(meta(2048, 64), meta(512, 64), None, meta(2048, dtype=torch.int64), 1.0, False)


def test_another_process_takes_the_tiles_that_were_kept(gpu: Gpu) -> None:
    assert chosen_tiles() == {}
    gpu.seconds = lambda config: config.kwargs.get("BM", config.kwargs.get("BV"))  # the smallest is the fastest
    call()
    first = list(gpu.launched)
    kept = json.loads(json.dumps(chosen_tiles()))
    assert kept["capability"] == 90
    assert set(kept["kernels"]) == {"prefix_attention._attention_kernel", "linear_logprob._partials_kernel"}

    forget()
    gpu.launched.clear()
    gpu.seconds = lambda config: -config.kwargs.get("BM", config.kwargs.get("BV"))
    call()
    assert [name for name, _ in gpu.launched] == [name for name, _ in first] and gpu.launched != first

    forget()
    gpu.launched.clear()
    gpu.timed.clear()
    assert use_tiles(kept) == []
    call()
    assert gpu.launched == first and gpu.timed == []
    assert json.loads(json.dumps(chosen_tiles())) == kept


def test_what_cannot_be_used_is_said_and_chosen_anew(gpu: Gpu) -> None:
    call()
    kept = json.loads(json.dumps(chosen_tiles()))
    forget()
    assert "of sm_80, this one is of sm_90" in use_tiles(kept | {"capability": 80})[0]
    name = "prefix_attention._attention_kernel"
    kept["kernels"][name][0]["tile"]["BM"] = 7
    kept["kernels"]["prefix_attention._gone_kernel"] = [{"key": [1], "tile": {}}]
    said = use_tiles(kept)
    assert len(said) == 2 and said[0].startswith(f"{name} has no tile") and "_gone_kernel has no tile" in said[1]
    gpu.timed.clear()
    call()
    assert set(gpu.timed) == {"_attention_kernel"}


def test_nothing_kept_is_nothing_used_and_nonsense_is_refused(gpu: Gpu) -> None:
    assert use_tiles({}) == []
    for nonsense in (
        {"kernels": {}},
        {"capability": 90, "kernels": {"a": [{"key": 1}]}},
        {"kernels": 3, "capability": 1},
    ):
        with pytest.raises(ValueError, match=r"no tiles as chosen_tiles\(\) gives them"):
            use_tiles(nonsense)


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "triton_missing", lambda: "the package triton is not installed")
    assert chosen_tiles() == {}
    assert use_tiles({"capability": 90, "kernels": {}}) == ["the package triton is not installed"]
