"""Which lines of gadcore and kernels run on a GPU alone, and which of them the rehearsal on the stand-in has executed.

    make test-rehearsal        # the tests under coverage.py, and then this:
    python -m bench.offline.cuda_lines build/rehearsal/.coverage.*

A line is one where a condition asks for the kind of device and this is what CUDA takes; where torch.cuda is called; or
of a module, class or function in WHOLE, which is made for CUDA. Bodies of Triton's kernels are not among them: the
interpreter runs a copy, and tests/triton holds each against its reference.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Made for CUDA as a whole: of a file everything, or the classes and functions that are named.
WHOLE: dict[str, tuple[str, ...]] = {
    "gadcore/models/fused_cuda.py": (),
    "gadcore/memory/meter.py": ("CudaMeter",),
    "gadcore/memory/tiers.py": ("PinnedTier",),
}
# Lines that no rehearsal can execute, by file and text, with the reason.
_NO_GPU = "said where there is no GPU: tests/unit/config"
_NO_LIBRARY = "needs what nvcc builds: tests/kernels/test_cuda_emulator.py runs it on a CPU"
_NO_PACKAGE = "needs bitsandbytes: tests/kernels/test_quantised.py computes so on a CPU where it is installed"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("kernels/quantised.py", "return _dense_by_library(weight, dtype)"): _NO_PACKAGE,
    ("gadcore/models/adapter.py", "raise UserError("): "said where bitsandbytes is missing: tests/unit/models",
    (
        "gadcore/config/device.py",
        'raise UserError(f"run.device = {config.run.device!r}, but torch sees no CUDA device: use cpu or auto")',
    ): _NO_GPU,
    ("gadcore/distributed/world.py", "torch.cuda.set_device(local_rank)"): "several processes with a GPU each, over "
    "NCCL: tests/gpu/test_sampling.py waits for them",
    ("gadcore/rollout/vllm.py", "return"): "no room to wake a sleeping vLLM: tests/unit/rollout/test_vllm_on_cuda.py",
    (
        "kernels/cuda/cast_copy.py",
        "processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1",
    ): _NO_LIBRARY,
    ("kernels/cuda/native.py", "with torch.cuda.device(device):"): _NO_LIBRARY,
    (
        "kernels/cuda/native.py",
        "error = self._functions[op](*arguments, torch.cuda.current_stream(device).cuda_stream)",
    ): _NO_LIBRARY,
}

_ON_CUDA = {
    "{}.type == 'cuda'": True,
    "{}.type != 'cuda'": False,
    "{}.type == 'cpu'": False,
    "{}.type != 'cpu'": True,
    "{}.is_cuda": True,
    "{}on_cpu": False,
    "{}on_cuda": True,
    "{}device == 'cuda'": True,
}


@dataclass(frozen=True)
class Line:
    """file: from the root of the repository. number: from 1."""

    file: str
    number: int
    text: str


def cuda_lines(root: Path) -> list[Line]:
    """Every such line, the first of each statement, in order."""
    found = []
    for folder in ("gadcore", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            # Reached by their own names below kernels/ and gadcore/ already.
            if any(parent.is_symlink() for parent in path.parents) or "kernels/triton" in str(path):
                continue
            name = str(path.relative_to(root))
            text = path.read_text()
            lines = text.splitlines()
            numbers = {
                n for n in _numbers(ast.parse(text), WHOLE.get(name)) if (name, lines[n - 1].strip()) not in EXCEPTIONS
            }
            found += [Line(name, number, lines[number - 1].strip()) for number in sorted(numbers)]
    return found


def _numbers(tree: ast.Module, whole: tuple[str, ...] | None) -> Iterator[int]:
    if whole == ():
        yield from _statements(tree.body)
    for node in ast.walk(tree):
        named = isinstance(node, ast.ClassDef | ast.FunctionDef) and whole and node.name in whole
        if named:
            yield from _statements(node.body)
        elif isinstance(node, ast.If):
            taken = _taken(node.test)
            if taken is not None:
                yield from _statements(node.body if taken else node.orelse)
        elif isinstance(node, ast.stmt) and not hasattr(node, "body") and _calls_torch_cuda(node):
            yield node.lineno


def _taken(test: ast.expr) -> bool | None:
    """Whether CUDA takes the branch of this condition; None where it does not ask."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _taken(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [taken for value in test.values if (taken := _taken(value)) is not None]
        return parts[0] if parts else None
    text = ast.unparse(test)
    return next((on for form, on in _ON_CUDA.items() if text.endswith(form.format(""))), None)


def _calls_torch_cuda(statement: ast.stmt) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda.") for node in ast.walk(statement)
    )


def _statements(body: list[ast.stmt]) -> Iterator[int]:
    """First lines of all statements that compute something: no docstrings, no definitions."""
    for statement in body:
        inner = [getattr(statement, name) for name in ("body", "orelse", "finalbody") if getattr(statement, name, None)]
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not text and not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.Import | ast.ImportFrom):
            yield statement.lineno
        for each in inner:
            yield from _statements(each)
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def missing(root: Path, files: Sequence[Path]) -> tuple[list[Line], list[Line]]:
    """(all lines, those that were not executed) by data files of coverage.py."""
    from coverage import CoverageData

    executed: dict[Path, set[int]] = {}
    for data in files:
        measured = CoverageData(str(data))
        measured.read()
        for file in measured.measured_files():
            executed.setdefault(Path(file).resolve(), set()).update(measured.lines(file) or ())
    lines = cuda_lines(root)
    return lines, [line for line in lines if line.number not in executed.get((root / line.file).resolve(), set())]


def main(root: Path, files: Sequence[Path]) -> int:
    """Says what was executed; 1 where something was not."""
    lines, left = missing(root, files)
    for line in left:
        print(f"not executed: {line.file}:{line.number}: {line.text}")
    print(f"{len(lines) - len(left)} of {len(lines)} lines that run on a GPU alone were executed on the stand-in")
    for (file, text), reason in EXCEPTIONS.items():
        print(f"left out: {file}: {text}: {reason}")
    return 1 if left or not files else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2], list(map(Path, sys.argv[1:]))))
