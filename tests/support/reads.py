"""Counts what makes the host wait for a device: reads of tensors' values, by the calls that take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

# What hands values of a tensor to Python, or makes a size depend on them.
READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "equal",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "unique",
    "equal",
)


class Reads(TorchFunctionMode):
    """counts: calls of each of READS inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def device_reads() -> Iterator[Counter[str]]:
    with Reads() as mode:
        yield mode.counts


class CountingTokenizer:
    """A tokenizer that counts its calls, to be put in a template's place of one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
