"""What the machine code of a compiled kernel needs: registers, spills, shared memory, instructions, occupancy.

Read from ptxas's log, the cubin and its disassembly, by the tools that come with Triton. Nothing here is a timing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from bench.offline.fakegpu import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Bytes of shared memory that one program may have, and that an SM has.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
SHARED_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
# Reserved by the system in every program's share.
SHARED_RESERVED = 1024
REGISTERS_OF_SM, WARPS_OF_SM, PROGRAMS_OF_SM = 65536, 64, 32
# Registers are given to a warp in units of this many.
REGISTER_UNIT = 256
# Columns of tensor memory of an SM (sm_100).
TENSOR_MEMORY = 512

# The matrix instruction that is the fast one on each target. Smaller tiles get HMMA everywhere.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}

INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "HMMA": r"\bHMMA\b",
    "FFMA": r"\bFFMA2?\b",
    "EX2": r"\bMUFU\.EX2\b",
    "UTMALDG": r"\bUTMALDG\b",
    "UTMASTG": r"\bUTMASTG\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDG": r"\bLDG\b",
    "LDG128": r"\bLDG\.E\S*\.(?:ENL2\.)?(?:128|256)\b",
    "STG": r"\bSTG\b",
    "STG128": r"\bSTG\.E\S*\.(?:ENL2\.)?(?:128|256)\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "ATOMIC": r"\b(?:REDG?|ATOMG?)\b",
}


@dataclass(frozen=True)
class Resources:
    """Of one program of a compiled kernel.

    registers: of a thread. spill_bytes: stored plus loaded, as ptxas says. local_accesses: LDL and STL in the code.
    shared_bytes: static and dynamic. tensor_memory: columns, sm_100 only. programs_of_sm: how many fit an SM at once;
    occupancy: their warps over the 64 that an SM can hold. serialised: ptxas says that asynchronous matrix instructions
    wait for each other. products: `tl.dot`s on the matrix units that the kernel asks for. instructions: how often each
    stands in the code, not how often it runs.
    """

    arch: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    tensor_memory: int
    warps: int
    stages: int
    programs_of_sm: int
    occupancy: float
    serialised: bool
    products: int
    code_lines: int
    instructions: dict[str, int]

    def faults(self) -> list[str]:
        """Why the kernel does not pass the gate; [] where it does."""
        found = []
        if self.spill_bytes or self.local_accesses:
            found.append(f"spills: {self.spill_bytes} bytes, {self.local_accesses} LDL and STL")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory: {self.shared_bytes} bytes, sm_{self.arch} gives {SHARED_LIMIT[self.arch]}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"tensor memory: {self.tensor_memory} columns, an SM has {TENSOR_MEMORY}")
        if self.products and not self.instructions.get(MATRIX[self.arch]):
            found.append(f"no {MATRIX[self.arch]} though it has a dot")
        if not self.programs_of_sm:
            found.append("no program fits an SM")
        return found

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


_known: dict[str, Resources] = {}


def resources(launch: Launch) -> Resources:
    """Reads a launch that was compiled by fakegpu. Raises RuntimeError where a tool gives no answer."""
    key = launch.compiled.hash
    if key not in _known:
        _known[key] = _read(launch.compiled, launch.log)
    return _known[key]


def _read(compiled: Any, log: str) -> Resources:
    metadata = compiled.metadata
    arch, cubin = int(metadata.target.arch), compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if found is None or spills is None:
        raise RuntimeError(f"no resource usage of {compiled.name} in {usage!r} and {log!r}")
    registers, stack, static = (int(number) for number in found.groups())
    instructions = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    # The dynamic share that Triton launches with; the static one of the cubin is 0 or the same bytes.
    shared = max(int(metadata.shared), static)
    tensor_memory = int(getattr(metadata, "tmem_size", 0) or 0)
    programs = programs_of_sm(arch, registers, shared, metadata.num_warps, tensor_memory)
    return Resources(
        arch=arch,
        registers=registers,
        stack_bytes=stack,
        spill_bytes=sum(int(number) for number in spills.groups()),
        local_accesses=instructions["LDL"] + instructions["STL"],
        shared_bytes=shared,
        tensor_memory=tensor_memory,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        programs_of_sm=programs,
        occupancy=programs * metadata.num_warps / WARPS_OF_SM,
        serialised="serialized" in log,
        products=_matrix_products(compiled.asm["ttir"]),
        code_lines=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", code)),
        instructions={name: count for name, count in instructions.items() if count},
    )


def _matrix_products(ttir: str) -> int:
    """Dots for the matrix units: not those of float32 with full precision, which only the FMA units can do."""
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot(?:_scaled)?\b", line)]
    return sum(not ("xf32>" in line.partition("->")[0] and "tf32" not in line) for line in dots)


def programs_of_sm(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """How many programs an SM holds at once: the least of what registers, shared memory, warps and slots allow."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    fits = [
        REGISTERS_OF_SM // max(per_warp * warps, 1),
        SHARED_OF_SM[arch] // (shared + SHARED_RESERVED),
        WARPS_OF_SM // warps,
        PROGRAMS_OF_SM,
    ]
    if tensor_memory:
        fits.append(TENSOR_MEMORY // tensor_memory)
    return min(fits)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
