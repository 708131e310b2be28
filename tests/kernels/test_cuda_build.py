"""csrc/cuda/build.py: what nvcc says of the kernels, and what it does about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import cuda_emulation

build = cuda_emulation.build_module()

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5first4BodyIfE' for 'sm_80'
ptxas info    : Function properties for _Z5first4BodyIfE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 61 registers, used 1 barriers, 8516 bytes smem, 448 bytes cmem[0]
ptxas info    : Compile time = 9.9 ms
ptxas warning : Registers are spilled to local memory in function 'f', 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
ptxas info    : Function properties for _Z6secondv
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 8 bytes cumulative stack size
"""


def test_report_is_read() -> None:
    first, second = build.parse_report(REPORT)
    assert first[1:] == ("sm_80", 61, 0, 8516)
    assert second[1:] == ("sm_90a", 64, 32, 0)
    assert "first" in first.kernel and "second" in second.kernel


def test_report_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(build.BuildError, match="cannot be read"):
        build.parse_report("Compiling entry function 'f' for 'sm_80'\nnothing more")


def fake_nvcc(folder: Path, report: str) -> str:
    """A compiler that writes its output file and prints `report`."""
    script = folder / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --list-gpu-code ]; then echo sm_80; echo sm_90; exit; fi\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f"echo new > \"$2\"\ncat <<'END'\n{report}END\n"
    )
    script.chmod(0o755)
    return str(script)


def test_spills_fail_the_build_and_leave_no_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lib" / "cuda.so"
    with pytest.raises(build.BuildError, match=r"registers are spilled by .*second.* on sm_90a \(32 bytes\)"):
        build.build(output, fake_nvcc(tmp_path, REPORT))
    assert "does not know sm_100a" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


def test_table() -> None:
    usages = [
        build.Usage("f<float>", target, registers, 0, 64) for target, registers in (("sm_80", 40), ("sm_90a", 41))
    ]
    assert [line.split() for line in build.table([*usages, build.Usage("g", "sm_90a", 7, 0, 0)]).splitlines()[1:]] == [
        ["f<float>", "40", "/", "0", "/", "64", "41", "/", "0", "/", "64"],
        ["g", "-", "7", "/", "0", "/", "0"],
    ]


def test_failing_compiler(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="no such file|No such file|not found"):
        build.compile_emulated([tmp_path / "missing.cu"], tmp_path / "out.so")
    assert not (tmp_path / "out.so").exists()


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="there is no nvcc")
def test_nvcc_compiles_every_kernel_for_every_target_without_spills(tmp_path: Path) -> None:
    usages = build.build(tmp_path / "cuda.so")
    print(build.table(usages))
    assert not any(usage.spills for usage in usages)
    targets = {usage.target for usage in usages}
    assert targets <= set(build.TARGETS)
    for target in targets:
        kernels = [usage.kernel.partition("<")[0] for usage in usages if usage.target == target]
        assert kernels == ["cast_copy_kernel"]
