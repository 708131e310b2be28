"""The CUDA C++ op on a GPU: copies of real size, graphs, and devices."""

from __future__ import annotations

import pytest
import torch

from gadcore.kernels.cast_copy import CastCopy, cast_copy
from gadcore.kernels.cuda import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.why_missing("cast_copy") is not None, reason=str(native.why_missing("cast_copy"))),
]


def test_cast_copy_of_a_layer_and_in_a_graph() -> None:
    """Shards of fp32 weights into slices of fused bf16 tensors, launched, and replayed with new values."""
    fused = torch.full((3 * 1024, 2048), torch.nan, dtype=torch.bfloat16, device="cuda")
    norm = torch.full((2051,), torch.nan, dtype=torch.float16, device="cuda")
    sources = [torch.randn(1024, 1024, device="cuda") for _ in range(6)] + [torch.randn(2050, device="cuda")]
    targets = [fused[r : r + 1024, c : c + 1024] for r in (0, 1024, 2048) for c in (0, 1024)] + [norm[1:]]
    copies = CastCopy(list(zip(sources, targets, strict=True)))
    assert copies.impl == "cuda"
    copies()
    assert all(torch.equal(target, source.to(target.dtype)) for source, target in copies.pairs)
    assert norm[0].isnan()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copies()
    for source in sources:
        source.neg_()
    graph.replay()
    assert all(torch.equal(target, source.to(target.dtype)) for source, target in copies.pairs)


def test_cast_copy_needs_a_gpu_for_its_tensors() -> None:
    with pytest.raises(ValueError, match='impl="cuda" needs tensors on a GPU, got cpu'):
        cast_copy([(torch.zeros(2), torch.zeros(2))], impl="cuda")


def test_a_second_gpu_gets_the_launch() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    source, target = torch.randn(1000, device="cuda:1"), torch.zeros(1000, dtype=torch.bfloat16, device="cuda:1")
    cast_copy([(source, target)], impl="cuda")
    assert torch.equal(target, source.bfloat16())
