"""The optional native library gadcore/_native.so, built from csrc/cpu; everything else stands in pyproject.toml.

It needs a C++ compiler and torch in the environment that builds (`pip install --no-build-isolation`). Without
them, or with GADCORE_NO_NATIVE=1, the package installs without it and computes with the references.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))


def _notice(reason: str) -> None:
    print(f"gadcore: native CPU ops not built ({reason}); the PyTorch references will be used.", file=sys.stderr)


def native() -> dict[str, Any]:
    """Arguments of setup() that build the library, {} where it cannot be built."""
    if os.environ.get("GADCORE_NO_NATIVE") == "1":
        _notice("GADCORE_NO_NATIVE=1")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        _notice("torch is not in the build environment: install with --no-build-isolation")
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                _notice(lines[0])
                self.extensions = []

    extension = CppExtension(
        "gadcore._native",
        SOURCES,
        # without -fopenmp at::parallel_for compiles to a serial loop
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-fopenmp"],
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


setup(**native())
