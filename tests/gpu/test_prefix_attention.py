"""The Triton prefix attention on a GPU: results and gradients against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.prefix_attention import prefix_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYOUTS = {
    "ragged": ((7, 1, 300, 2), ((3, 1, 9), (4,), (), (17, 170, 40))),
    "a group as in training": ((512,), ((128,) * 9,)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (32, 8, 128), (4, 4, 96)])
@pytest.mark.parametrize("window", [None, 37])
def test_against_fp64(dtype, layout, heads, kv_heads, width, window) -> None:
    packed = PrefixLayout.of(*LAYOUTS[layout], device="cuda")
    generator = torch.Generator().manual_seed(0)
    sizes = [(packed.tokens, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, grad = (torch.randn(size, generator=generator).to("cuda", dtype) for size in sizes)

    def run(impl, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = prefix_attention(*leaves, packed, window=window, impl=impl)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    actual = run("triton", query, key, value)
    expected = run("reference", query.double(), key.double(), value.double())
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()
