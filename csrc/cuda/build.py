"""Builds csrc/cuda: gadcore/_cuda.so with nvcc, or a library with which the CPU runs the same kernels.

    python csrc/cuda/build.py                            gadcore/_cuda.so, and what each kernel takes of a GPU
    python csrc/cuda/build.py --output F --report R.json
    python csrc/cuda/build.py --emulated F               for tests, with a C++ compiler (see simt.h)

A kernel that spills registers fails the build. nvcc is $CUDA_HOME's, $PATH's or /usr/local/cuda's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
OUTPUT = SOURCES.parents[1] / "gadcore" / "_cuda.so"

# The code of each target, and of the oldest one also in a form that a driver compiles for GPUs that are not named here.
TARGETS = ("sm_80", "sm_90a", "sm_100a")
ANY_GPU = "compute_80"


class BuildError(RuntimeError):
    """A compiler failed, or a kernel spills; the message says which."""


class Usage(NamedTuple):
    """What ptxas says that one kernel takes on one target. Spills and shared memory in bytes, shared memory static."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared_memory: int


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        if (path := Path(home) / "bin" / "nvcc").exists():
            return str(path)
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if Path(p).exists()), None)


def find_compiler() -> str | None:
    """The path of a C++ compiler, or None."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(output: Path = OUTPUT, nvcc: str | None = None) -> list[Usage]:
    """Builds the library for every target that this nvcc knows. Raises BuildError."""
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: set CUDA_HOME")
    known = _run([nvcc, "--list-gpu-code"]).split()
    # The list has no names of code for one architecture alone (the "a").
    targets = [target for target in TARGETS if target.rstrip("a") in known]
    if missing := [target for target in TARGETS if target not in targets]:
        print(f"gadcore: this nvcc does not know {', '.join(missing)}; the library is built without", file=sys.stderr)
    codes = [f"arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    codes.append(f"arch={ANY_GPU},code={ANY_GPU}")
    options = ["-std=c++17", "-O3", "--shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v,--warn-on-spills"]
    log = _compile([nvcc, *options, *(f"-gencode={code}" for code in codes)], sorted(SOURCES.glob("*.cu")), output)
    usages = parse_report(log)
    if not usages:
        raise BuildError(f"ptxas reported nothing:\n{log}")
    if spilling := [f"{u.kernel} on {u.target} ({u.spills} bytes)" for u in usages if u.spills]:
        output.unlink()
        raise BuildError(f"registers are spilled by {', '.join(spilling)}")
    return usages


def build_emulated(output: Path, compiler: str | None = None) -> None:
    """Builds the library that runs the kernels on the CPU. Raises BuildError."""
    compile_emulated([*sorted(SOURCES.glob("*.cu")), SOURCES / "emulation.cpp"], output, compiler)


def compile_emulated(sources: list[Path], output: Path, compiler: str | None = None) -> None:
    """Builds a library from sources that include simt.h, for the CPU. Raises BuildError."""
    compiler = compiler or find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found: set CXX")
    # -ffp-contract=off: as written, like the fmaf that the kernels name.
    options = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC", f"-I{SOURCES}"]
    _compile([compiler, *options, "-fvisibility=hidden", "-x", "c++"], sources, output)


def parse_report(log: str) -> list[Usage]:
    """What `-Xptxas -v` printed, one entry for each kernel and target."""
    usages: list[Usage] = []
    for part in log.split("Compiling entry function ")[1:]:
        name, target = re.findall(r"'([^']+)'", part)[:2]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if registers is None or len(spills) < 2:
            raise BuildError(f"ptxas' report cannot be read:\n{part}")
        memory = int(shared[1]) if shared else 0
        usages.append(Usage(_readable(name), target, int(registers[1]), sum(spills[:2]), memory))
    return usages


def _readable(mangled: str) -> str:
    """name<arguments> of a kernel, without namespaces and parameters; the mangled name where c++filt is missing."""
    filt = shutil.which("c++filt")
    if filt is None:
        return mangled
    plain = _run([filt, mangled]).strip()
    match = re.search(r"(\w+(?:<[^()]*>)?)\((?!anonymous)", plain)
    return match[1].replace("__nv_", "").replace("__", "") if match else plain


def _compile(command: list[str], sources: list[Path], output: Path) -> str:
    """Compiles to `output`, which appears when it is whole: another process may be loading the one before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        log = _run([*command, "-o", str(partial), *map(str, sources)])
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return log


def _run(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


def table(usages: list[Usage]) -> str:
    """One line for each kernel: registers, spilled bytes and bytes of shared memory, for each target."""
    targets = list(dict.fromkeys(u.target for u in usages))
    by_kernel: dict[str, dict[str, Usage]] = {}
    for u in usages:
        by_kernel.setdefault(u.kernel, {})[u.target] = u
    lines = ["registers / spilled bytes / shared memory".ljust(44) + "".join(t.rjust(16) for t in targets)]
    for kernel, of in sorted(by_kernel.items()):
        cells = (f"{of[t].registers} / {of[t].spills} / {of[t].shared_memory}" if t in of else "-" for t in targets)
        lines.append(kernel.ljust(44) + "".join(cell.rjust(16) for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--report", type=Path, help="write the table as JSON")
    parser.add_argument("--emulated", type=Path, help="build the library for the CPU instead")
    arguments = parser.parse_args()
    try:
        if arguments.emulated:
            build_emulated(arguments.emulated)
            return 0
        usages = build(arguments.output)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(usages))
    if arguments.report:
        arguments.report.write_text(json.dumps([u._asdict() for u in usages], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
