"""The gate on machine code: what it says of our kernels, and that it notices what it is there for.

In a process of its own: where TRITON_INTERPRET=1 is set nothing is compiled, and kernels defined then never will be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def spilling(x, out, SIZE: tl.constexpr):
    # 64 KiB of it alive at once in the registers of one warp.
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    total = tl.sum(a, 0)
    tl.store(out + at, a * total)


@triton.jit
def product(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for first in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + first + k[None, :])
        right = tl.load(b + n[None, :] * K + first + k[:, None])
        acc = tl.dot(left, right, acc)
    tl.store(out + m[:, None] * N + n[None, :], acc)
"""

# Target, registers, bytes of shared memory, warps, columns of tensor memory, and how many such programs fit an SM.
OCCUPANCY = [
    (90, 32, 0, 4, 0, 16),  # bound by the warps of an SM
    (90, 168, 0, 8, 0, 1),  # by registers: twice 168 x 256 is more than 65536
    (90, 128, 0, 8, 0, 2),
    (90, 32, 100 << 10, 4, 0, 2),  # by shared memory
    (80, 32, 100 << 10, 4, 0, 1),
    (90, 16, 0, 1, 0, 32),  # by the slots for programs
    (100, 32, 0, 4, 256, 2),  # by tensor memory
    (90, 32, 228 << 10, 4, 0, 0),
]

CODE = """
import json, sys
import torch
from bench.offline.aot import programs_of_sm, resources
from bench.offline.fakegpu import compile_only
from toys import product, spilling

def meta(*sizes, dtype=torch.bfloat16):
    return torch.empty(*sizes, dtype=dtype, device="meta")

found = {}
def read(name, target, call):
    with compile_only(target) as launches:
        call()
    found[name] = [
        {"kernel": launch.kernel, "programs": launch.programs, "faults": read.faults(), **read.as_row()}
        for launch in launches
        for read in [resources(launch)]
    ]

def head(T=1024, H=512, V=4096):
    return meta(T, H), meta(V, H), None, meta(T, dtype=torch.int64)

def bt():
    from gadcore.kernels.triton import bt_score
    last, offsets, taught = (meta(n, dtype=d) for n, d in ((18, torch.int64), (3, torch.int64), (2, torch.bool)))
    bt_score.forward(meta(512, 1024), last, meta(1024), None, offsets, taught)

def logprob():
    from gadcore.kernels.triton import linear_logprob
    linear_logprob.forward(*head(), 1.0, False)

def attention_backward(heads, key_heads, D):
    from gadcore.kernels.triton import prefix_attention
    query, key = (meta(600, n, D, dtype=torch.float32) for n in (heads, key_heads))
    layout = meta(9, dtype=torch.int64), meta(8, dtype=torch.int64)
    lse = meta(600, heads, dtype=torch.float32)
    prefix_attention.backward(query, query, key, key, query, lse, *layout, 0.1, 0, 180, 1, 100)

def matrices(M, N, BK, warps, stages):
    product[(1,)](meta(M, 512), meta(N, 512), meta(M, N), 512, M=M, N=N, BK=BK, num_warps=warps, num_stages=stages)

read("bt_score", 90, bt)
read("linear_logprob", 90, logprob)
read("attention of SmolLM2-135M", 100, lambda: attention_backward(9, 3, 64))
read("attention of Qwen2.5-3B", 80, lambda: attention_backward(16, 2, 128))
read("good", 90, lambda: matrices(128, 128, 64, 4, 3))
read("good on sm_80", 80, lambda: matrices(128, 128, 32, 8, 3))
many = meta(16384, dtype=torch.float32)
read("spills", 90, lambda: spilling[(1,)](many, many, SIZE=16384, num_warps=1))
read("shared memory", 90, lambda: matrices(128, 128, 128, 8, 6))
read("small tile", 90, lambda: matrices(16, 16, 64, 4, 3))
found["programs of an SM"] = [programs_of_sm(*case[:-1]) for case in json.loads(sys.argv[1])]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Triton reads the source of a kernel from its file.
    folder = tmp_path_factory.mktemp("aot")
    (folder / "toys.py").write_text(KERNELS, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(folder)])
    command = [sys.executable, "-c", CODE, json.dumps(OCCUPANCY)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["bt_score", "linear_logprob"])
def test_our_kernels_pass_for_sm_90(found: dict[str, Any], name: str) -> None:
    assert found[name]
    for code in found[name]:
        assert code["faults"] == [] and code["programs"] >= 1 and code["programs_of_sm"] >= 1


@pytest.mark.parametrize("name", ["attention of SmolLM2-135M", "attention of Qwen2.5-3B"])
def test_attention_in_float32_spills_nothing_in_its_backward_pass(found: dict[str, Any], name: str) -> None:
    """For sm_100 and sm_80, where other tiles do."""
    assert [code["kernel"] for code in found[name]][:2] == ["_d_query_kernel", "_d_key_value_kernel"]
    assert all(code["faults"] == [] for code in found[name])


def test_the_head_is_compiled_in_every_configuration_with_tensor_cores_and_tma(
    found: dict[str, Any],
) -> None:
    with_products = [code for code in found["linear_logprob"] if code["products"]]
    assert len(with_products) > 1
    for code in with_products:
        assert code["instructions"]["HGMMA"] and code["instructions"]["UTMALDG"]


def test_a_good_product_passes(found: dict[str, Any]) -> None:
    (hopper,), (ampere,) = found["good"], found["good on sm_80"]
    assert hopper["faults"] == ampere["faults"] == []
    assert hopper["instructions"]["HGMMA"] and "HGMMA" not in ampere["instructions"]
    assert ampere["instructions"]["HMMA"] and ampere["instructions"]["LDGSTS"]
    assert 0 < hopper["shared_bytes"] <= 232448 and hopper["products"] == ampere["products"] == 1


def test_a_kernel_that_spills_fails(found: dict[str, Any]) -> None:
    (code,) = found["spills"]
    assert code["spill_bytes"] > 0 and code["local_accesses"] > 0
    assert [fault.partition(":")[0] for fault in code["faults"]] == ["spills"]


def test_a_kernel_with_too_much_shared_memory_fails(found: dict[str, Any]) -> None:
    (code,) = found["shared memory"]
    assert code["shared_bytes"] > 232448 and code["programs_of_sm"] == 0
    assert any(fault.startswith("shared memory") for fault in code["faults"])


def test_a_dot_without_the_fast_instruction_fails(found: dict[str, Any]) -> None:
    (code,) = found["small tile"]
    assert code["faults"] == ["no HGMMA though it has a dot"] and code["instructions"]["HMMA"]


def test_programs_of_an_sm(found: dict[str, Any]) -> None:
    assert found["programs of an SM"] == [programs for *_, programs in OCCUPANCY]
