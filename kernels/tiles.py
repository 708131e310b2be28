"""The tiles that the autotuned Triton kernels have chosen, as JSON: kept, a later process computes with the same ones.

A kernel times its tiles at the first call of a kind and takes the fastest. Sums go another way in another tile, so that
two processes whose timings differ differ in the last bits, with everything else equal.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from gadcore.kernels.dispatch import triton_missing
from gadcore.kernels.ops import OPS


def chosen_tiles() -> dict[str, Any]:
    """What was chosen so far in this process, or taken over by use_tiles(), to be written as JSON.

    {"capability": of the GPU, as 90; "kernels": {"<op>.<kernel>": [{"key": what was called, "tile": what computes it},
    ..]}}; {} where nothing was chosen.
    """
    kernels = {
        name: [{"key": list(key), "tile": config.all_kwargs()} for key, config in tuner.cache.items()]
        for name, tuner in _tuners(imported_only=True)
        if tuner.cache
    }
    return {"capability": _capability(), "kernels": kernels} if kernels else {}


def use_tiles(tiles: dict[str, Any]) -> list[str]:
    """Lets the kernels of this process, on a GPU, compute with the tiles of chosen_tiles(), read from JSON again.

    What has been chosen here already is replaced. Returns a sentence for each that cannot be used (another GPU, a
    kernel or tile that is no more): those are chosen anew. Raises ValueError where `tiles` is nothing of the kind.
    """
    if not tiles:
        return []
    try:
        chosen = [
            (name, tuple(one["key"]), dict(one["tile"])) for name, every in tiles["kernels"].items() for one in every
        ]
        capability = int(tiles["capability"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"no tiles as chosen_tiles() gives them: {error!r}") from error
    if (reason := triton_missing()) is not None:
        return [reason]
    if capability != _capability():
        return [f"the tiles were chosen on a GPU of sm_{capability}, this one is of sm_{_capability()}"]
    tuners = dict(_tuners(imported_only=False))
    unused = []
    for name, key, tile in chosen:
        configs = tuners[name].configs if name in tuners else []
        config = next((config for config in configs if config.all_kwargs() == tile), None)
        if config is None:
            unused.append(f"{name} has no tile {tile} any more")
        else:
            tuners[name].cache[key] = config
    return unused


def _tuners(imported_only: bool) -> Iterator[tuple[str, Any]]:
    """(name, autotuner) of every autotuned kernel; imported_only: of modules that a call has imported already."""
    if triton_missing() is not None:
        return
    from triton.runtime.autotuner import Autotuner

    for op in (op for op, of in OPS.items() if of.triton):
        path = f"gadcore.kernels.triton.{op}"
        module = sys.modules.get(path) if imported_only else importlib.import_module(path)
        for name, value in vars(module).items() if module else ():
            if isinstance(value, Autotuner) and value.base_fn.__module__ == path:
                yield f"{op}.{name}", value


def _capability() -> int:
    from gadcore.kernels.triton._shared import capability

    return capability()
