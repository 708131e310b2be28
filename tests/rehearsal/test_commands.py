"""What else asks for the device: other engines and stages, the plan, figures of the GPU, what is missing."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from bench.offline.cuda_standin import gpu
from bench.offline.cuda_standin.api import NAME, UUID
from gadcore.checkpoint.state import restore_rng, rng_state
from gadcore.config.device import best_device
from gadcore.cpu.backbone import rotate as rotate_on_cpu
from gadcore.errors import UserError
from gadcore.kernels import dispatch
from gadcore.kernels import prefix_attention as attention
from gadcore.kernels.cpu import native
from gadcore.kernels.cpu.gated_mlp import gated_mlp
from gadcore.kernels.layout import PrefixLayout
from gadcore.memory.placement import tier_name
from gadcore.memory.resident import resident_bytes
from gadcore.memory.tiers import PinnedTier
from gadcore.models.fused_cuda import norm_of, rotate
from gadcore.plan import calibrate, machine
from gadcore.plan.dimensions import read_dimensions
from gadcore.record.monitor import Gpu
from gadcore.run import main
from tests.rehearsal.test_run import GIB, MIB, arguments
from tests.support.tiny import save_tiny

CUDA = torch.device("cuda")


def test_the_baseline_beside_an_engine_of_hugging_face(tmp_path) -> None:
    with gpu(80 * GIB):
        more = {
            "rollout.engine": "hf",
            "memory.offload": "none",
            "schedule.seqkd_steps": 1,
            "student.master": "host",
            "student.autocast": "none",
        }
        given = arguments(tmp_path, **more)
        for name in ("dtype", "block_size", "gpu_memory_utilization"):
            place = given.index(f"--rollout.{name}")
            del given[place : place + 2]
        assert main(["seqkd", *given]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["machine"]["device"] == NAME and summary["memory"]["offload"] == "none"


def test_the_machine_is_the_gpu(capsys) -> None:
    with gpu(80 * GIB):
        assert best_device() == CUDA
        here = machine.here(1)
        assert (here.kind, here.name) == ("cuda", f"this machine: {NAME}")
        assert here.figures["memory_bytes"] == 80 * GIB


def test_calibration(monkeypatch, tmp_path) -> None:
    dimensions = read_dimensions(str(save_tiny(tmp_path, head_dim=64)))
    assert calibrate._tokens(dimensions, CUDA) == 4096
    small = {"_DECODE_BYTES": 1e4, "_FILE_BYTES": 1 << 16, "_COPY_BYTES": 1 << 16, "_HEAD_TOKENS": 32}
    for name, value in small.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate, "_tokens", lambda *_: 128)
    monkeypatch.setattr(calibrate._Clock, "__call__", lambda clock, work, repeats=5: _once(clock, work))
    with gpu(4 * GIB):
        figures = calibrate.measure(dimensions, AutoConfig.from_pretrained(tmp_path), lambda line: None)
    assert figures["product_flops_bfloat16"] > 0 and "decode_flops_share" in figures


def test_a_tier_says_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="file frees host memory and this run is on a GPU"):
        tier_name("file", "cuda")
    with gpu(64 * MIB):
        tier = PinnedTier(CUDA, "student.parameters", 4096)
        with pytest.raises(ValueError, match="device memory is needed"):
            tier.start_load(None)
        tier.close()


def test_random_states_of_the_gpu_are_kept() -> None:
    with gpu(64 * MIB):
        kept = rng_state()
        assert "cuda:0" in kept.tensors
        restore_rng(kept)


def test_figures_of_the_gpu(monkeypatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        NVMLError_NotFound=KeyError,
        NVML_CLOCK_SM=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=GIB),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with gpu(64 * MIB):
        found = Gpu(CUDA, lambda line: None)
        assert found._handle == f"GPU-{UUID}" and found.gauges["machine/gpu_memory_used_gib"]() == 1
        found.close()


def test_liger_is_missed_by_name(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with gpu(64 * MIB), pytest.raises(UserError, match="pip install liger-kernel"):
        norm_of(torch.ones(2, 4, device="cuda"), torch.ones(4, device="cuda"), eps=1e-6, shift=0.0)


def test_heads_that_no_kernel_takes_are_computed_by_the_reference() -> None:
    with gpu(64 * MIB):
        layout = PrefixLayout.of([2], [[1, 2]], CUDA)
        q, k, v = (torch.randn(5, 2, 32, device="cuda") for _ in range(3))
        found = attention.prefix_attention(q, k, v, layout)
    assert found.shape == (5, 2, 32)


def test_the_doctor_looks_at_the_gpu(capsys) -> None:
    with gpu(80 * GIB):
        assert main(["doctor"]) in (0, 2)
    assert NAME in capsys.readouterr().out


def test_memory_that_cannot_be_locked_is_told() -> None:
    with gpu(64 * MIB), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *_: 2)
        with pytest.raises(UserError, match="cannot lock 0 MiB of host memory for student.parameters: CUDA error 2"):
            PinnedTier(CUDA, "student.parameters", 4096)


def test_what_is_made_for_a_cpu_refuses_tensors_of_the_gpu() -> None:
    with gpu(64 * MIB):
        x, weight = torch.ones(2, 4, device="cuda"), torch.ones(4, 4, device="cuda")
        with pytest.raises(ValueError, match="needs tensors on the CPU"):
            native.choose("rms_norm", "cpu", x)
        with pytest.raises(ValueError, match="must be float32 on the CPU"):
            gated_mlp(x, weight, weight, weight)
        with pytest.raises(ValueError, match="only contiguous CPU tensors have pages"):
            resident_bytes(x)
        q, cos = torch.ones(1, 2, 3, 8, device="cuda"), torch.ones(1, 3, 8, device="cuda")
        own = lambda *given, unsqueeze_dim: given[:2]  # noqa: E731
        assert rotate_on_cpu(own, q, q, cos, cos)[0] is q
        # And what no kernel of a GPU takes is the model's own as well.
        assert rotate(own, q.double(), q.double(), cos, cos)[0].dtype == torch.float64
        assert rotate(own, q[..., :5], q[..., :5], cos, cos)[0].shape[-1] == 5
        assert rotate(own, q[0], q[0], cos, cos)[0].dim() == 3


def test_a_gpu_without_triton_computes_by_the_reference(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "the package triton is not installed")
    with gpu(64 * MIB), pytest.warns(UserWarning, match="computes with the PyTorch reference"):
        assert dispatch.choose("bt_score", "auto", torch.ones(2, device="cuda")) == "reference"


def _once(clock: calibrate._Clock, work) -> float:
    work()
    clock._wait()
    return 1.0
