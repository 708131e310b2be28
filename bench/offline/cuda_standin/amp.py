"""Autocast as on CUDA, whose list of operations that compute in float32 is longer than a CPU's.

The list is that of aten/src/ATen/autocast_mode.h (torch 2.13): AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE and
the norms, as far as language models meet them. Products (AT_FORALL_LOWER_PRECISION_FP) are the
same operations on both, so those are left to the CPU's autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

WIDE = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow", "__pow__", "__rpow__", "softplus", "layer_norm", "group_norm", "native_layer_norm",
    "rms_norm", "norm", "cosine_similarity", "cross_entropy", "nll_loss", "kl_div", "l1_loss", "smooth_l1_loss",
    "mse_loss", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum",
}  # fmt: skip


class CudaAutocast(TorchFunctionMode):
    """Operations of the list compute in float32 where autocast is on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (
            name in WIDE
            and torch._C.is_autocast_enabled("cpu")
            and any(isinstance(a, Tensor) and a.is_cuda for a in args)
        ):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """torch.autocast("cuda") works in the block."""
    autocast = torch.amp.autocast_mode.autocast
    init, enabled, dtype = autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def here(device_type: str | None = None) -> str:
        return "cpu" if device_type in (None, "cuda") else device_type

    def made(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, here(device_type), *args, **kwargs)

    autocast.__init__ = made  # type: ignore[method-assign]
    torch.is_autocast_enabled = lambda device_type=None: enabled(here(device_type))  # type: ignore[assignment]
    torch.get_autocast_dtype = lambda device_type: dtype(here(device_type))  # type: ignore[assignment]
    try:
        with CudaAutocast():
            yield
    finally:
        autocast.__init__ = init  # type: ignore[method-assign]
        torch.is_autocast_enabled, torch.get_autocast_dtype = enabled, dtype
