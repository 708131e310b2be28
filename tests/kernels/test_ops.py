"""The table of ops against the files and functions that it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from gadcore.kernels.cpu import native
from gadcore.kernels.ops import OPS, module_of, native_op
from tests.support.grid_checks import GRIDS
from tests.support.importable import make_bench_importable

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
# Files that are no op.
HELPERS = {"bits", "quantised", "quantised_linear", "", "dispatch", "layout", "native", "ops", "tiles"}


def functions_of(path: Path) -> set[str]:
    """Names of the functions at the top of a file, without importing it: triton is not on every machine."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def files_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - HELPERS


@pytest.mark.parametrize("op", OPS)
def test_the_module_of_an_op_has_its_function(op: str) -> None:
    path = KERNELS.joinpath(*module_of(op).split(".")[2:]).with_suffix(".py")
    assert op in functions_of(path)


def test_every_file_is_an_op_of_the_table() -> None:
    assert files_in(KERNELS) | files_in(KERNELS / "cpu") == set(OPS)
    assert files_in(KERNELS / "triton") == {op for op, of in OPS.items() if of.triton}
    assert files_in(KERNELS / "flash") == {op for op, of in OPS.items() if of.flash}
    assert files_in(KERNELS / "cuda") == {op for op, of in OPS.items() if of.cuda}


@pytest.mark.parametrize("op", [op for op, of in OPS.items() if of.triton])
def test_triton_files_have_the_passes_of_the_table(op: str) -> None:
    assert functions_of(KERNELS / "triton" / f"{op}.py") >= set(OPS[op].passes)


def test_cuda_sources_have_the_names_of_their_ops() -> None:
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"error"}
    assert sources == {op for op, of in OPS.items() if of.cuda}


def native_names() -> set[str]:
    """The ops that the sources of the native library define."""
    sources = (ROOT / "csrc" / "cpu").glob("*.cpp")
    return {name for path in sources for name in re.findall(r"m\.def\(\s*\"(\w+)\(", path.read_text(encoding="utf-8"))}


def test_native_ops_are_those_of_the_table_and_those_that_python_calls() -> None:
    """No C++ op is promised that is not there, and none is there that nothing could call."""
    names = native_names()
    promised = {native_op(op, which) for op, of in OPS.items() if of.cpu for which in of.passes}
    assert promised <= names
    python = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "gadcore").rglob("*.py"))
    python += "".join(path.read_text(encoding="utf-8") for path in KERNELS.rglob("*.py"))
    # Those that only tests call choose between the instruction sets of the other ops.
    called = {name for name in names if re.search(rf"\b{name}\b", python)} | {"_cpu_level", "_cpu_bf16_products"}
    assert names == promised | called


@pytest.mark.native
def test_the_library_is_that_of_the_sources() -> None:
    missing = {name: native.why_missing(name) for name in native_names() if not hasattr(torch.ops.gadcore, name)}
    assert not missing


def test_there_is_a_grid_for_every_op_that_the_table_promises_one_for() -> None:
    assert set(GRIDS) == {op for op, of in OPS.items() if of.grid}


def test_what_is_compiled_ahead_of_time_are_passes_of_the_table() -> None:
    make_bench_importable()
    from bench.offline import aot_suite

    compiled = {case.op for case, _ in aot_suite._cases(quick=True) if case.impl == "triton"}
    passes = {op if len(of.passes) == 1 else f"{op} {which}" for op, of in OPS.items() for which in of.passes}
    assert compiled and compiled <= passes


def test_the_guide_names_ops_of_the_table() -> None:
    guide = (ROOT / "docs" / "guide" / "kernels.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w.]+)` \|", guide, flags=re.M)
    assert named and all(module_of(name.split(".")[-1]) == f"gadcore.kernels.{name}" for name in named)
