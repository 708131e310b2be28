"""Lets code that takes another way on CUDA take that way on tensors that lie elsewhere.

Liger-Kernel, for one, adds up the gradient of a weight by `addmm(out=...)` on CUDA, and by a product, a cast and a sum
on anything else: measured off a GPU, the second way would be held against it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _SaysCuda(TorchFunctionMode):
    """Every tensor says that it lies on CUDA, and what is made there lies where the others do."""

    def __init__(self, real: torch.device) -> None:
        super().__init__()
        self.real = real

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if kwargs.get("device") is not None:
            kwargs["device"] = self.real
        return func(*args, **kwargs)


class _Scalars(TorchDispatchMode):
    """Answers `.item()` of meta tensors, which hold no value, with the one that `shape` code can go on with."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.value if args[0].is_floating_point() else int(self.value)
        return func(*args, **(kwargs or {}))


H100_L2_BYTES = 50 << 20
# An H100's. One object, changed in place: code may well keep what it was given.
_properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=H100_L2_BYTES)


@contextmanager
def as_cuda(real: str, *, scalars: float | None = None, l2_bytes: int = H100_L2_BYTES) -> Iterator[None]:
    """Code that takes another way on CUDA takes that way in the block, on tensors of the device `real` ("cpu", "meta").

    It finds an H100, with l2_bytes of L2. scalars: what `.item()` of a meta tensor gives.
    """
    before = {name: getattr(torch.cuda, name) for name in ("get_device_capability", "get_device_properties")}
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: _properties
    _properties.L2_cache_size = l2_bytes
    try:
        with contextlib.ExitStack() as modes:
            modes.enter_context(_SaysCuda(torch.device(real)))
            if scalars is not None:
                modes.enter_context(_Scalars(scalars))
            yield
    finally:
        _properties.L2_cache_size = H100_L2_BYTES
        for name, function in before.items():
            setattr(torch.cuda, name, function)
