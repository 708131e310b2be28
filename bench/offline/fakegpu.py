"""Pretends that a GPU of a given architecture is there, so that real launch code compiles its kernels without one.

    with compile_only(90) as launches:
        some_op(meta_tensors)          # every kernel launch compiles for sm_90 and is recorded; nothing runs

Works on meta tensors: a launch needs shapes, dtypes, strides and (for divisibility by 16) addresses, and those of meta
tensors count from 0. An autotuned kernel is compiled in every configuration that survives its own pruning. Needs
TRITON_INTERPRET unset.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError(
        "bench.offline.fakegpu needs a process without TRITON_INTERPRET: the interpreter compiles nothing"
    )

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction


class FakeDriver(DriverBase):
    """What JITFunction.run asks of a driver before it launches, answered for `target`."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched on this driver")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed on this driver")

    def get_current_device(self) -> int:
        # JITFunction keeps what it compiled by device, not by target: every target is a device of its own.
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch, in one configuration.

    config: the constants and options that an autotuner chose, {} for other kernels. grid: as it would be launched.
    compiled: Triton's CompiledKernel. log: ptxas -v, of the first launch that compiled this kernel. seconds: of the
    compilation, 0 where an earlier launch had done it.
    """

    kernel: str
    grid: tuple[int, ...]
    config: dict[str, Any]
    compiled: Any
    log: str
    seconds: float

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


# By the hash of the kernel. Kept as long as Triton keeps compiled kernels, which is as long as the process lives.
_logs: dict[str, str] = {}


class _Recorder:
    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.config: dict[str, Any] = {}

    def run(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            log, start = io.StringIO(), time.perf_counter()
            # Triton prints the log of ptxas where the knob below says so.
            with contextlib.redirect_stdout(log):
                compiled = original(function, *args, grid=grid, warmup=True, **kwargs)
            fresh = compiled.hash not in _logs
            _logs.setdefault(compiled.hash, log.getvalue())
            if callable(grid):
                grid = grid({**dict(zip(function.arg_names, args, strict=False)), **kwargs})
            seconds = time.perf_counter() - start if fresh else 0.0
            name, text = function.fn.__name__, _logs[compiled.hash]
            self.launches.append(Launch(name, tuple(grid), dict(self.config), compiled, text, seconds))
            return compiled

        return run

    def run_every_config(self, tuner: Autotuner, *args: Any, **kwargs: Any) -> Any:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        configs = tuner.prune_configs(kwargs)
        compiled = None
        for config in configs:
            self.config = config.all_kwargs()
            if config.pre_hook:
                config.pre_hook({**tuner.nargs, **kwargs, **config.all_kwargs()})
            compiled = tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        self.config = {}
        tuner.best_config, tuner.nargs = configs[0], None
        return compiled


@contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Compiles, for sm_<arch>, what the block launches, and lists it. arch: 80, 90, 100."""
    recorder = _Recorder()
    driver, jit_run, autotuner_run = triton.runtime.driver._active, JITFunction.run, Autotuner.run
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        # Compiled anew by every process: a kernel out of the cache comes without ptxas's log.
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.runtime.driver.set_active(FakeDriver(GPUTarget("cuda", arch, 32)))
        JITFunction.run = recorder.run(jit_run)
        Autotuner.run = lambda tuner, *args, **kwargs: recorder.run_every_config(tuner, *args, **kwargs)
        try:
            yield recorder.launches
        finally:
            JITFunction.run, Autotuner.run = jit_run, autotuner_run
            triton.runtime.driver._active = driver
