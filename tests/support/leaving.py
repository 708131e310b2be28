"""A model that leaves the device, and comes back with something that needs most of what vLLM takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

MIB = 1 << 20
There = Callable[[], AbstractContextManager[None]]


def leaving() -> tuple[list[Any], Callable[[torch.nn.Module], There]]:
    """(visits, away). away(model) takes the model off the device and returns what brings it back for a while; of every
    such visit `visits` has 30 MiB while it lasts, and None afterwards."""
    visits: list[Any] = []

    def away(model: torch.nn.Module) -> There:
        kept = {p: p.detach().clone() for p in model.parameters()}

        @contextmanager
        def there() -> Iterator[None]:
            visits.append(torch.empty(30 * MIB, dtype=torch.uint8, device="cuda"))
            for p, values in kept.items():
                p.data = values
            yield
            visits[-1] = None
            for p in kept:
                p.data = torch.empty(0, dtype=p.dtype, device="cuda")

        for p in kept:
            p.data = torch.empty(0, dtype=p.dtype, device="cuda")
        return there

    return visits, away
