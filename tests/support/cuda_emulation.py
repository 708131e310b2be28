"""csrc/cuda as a library that runs on the CPU, built once for each test process."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

from gadcore.kernels.cuda.native import Library

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@functools.cache
def build_module() -> ModuleType:
    """csrc/cuda/build.py."""
    spec = importlib.util.spec_from_file_location("cuda_build", CUDA / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str | None:
    """Why the library cannot be built here, or None."""
    return None if build_module().find_compiler() else "there is no C++ compiler"


@functools.cache
def _built() -> tuple[Library, ctypes.CDLL]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        build_module().build_emulated(path)
        # What is loaded stays when the file goes.
        return Library(path), ctypes.CDLL(str(path))


def library() -> Library:
    return _built()[0]


def set_seed(seed: int) -> None:
    """The order in which blocks and threads run; 0 is ascending."""
    function = _built()[1].gadcore_emulation_seed
    function.argtypes = [ctypes.c_uint64]
    function(seed)
