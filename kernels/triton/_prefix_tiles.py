"""The tiles that the kernels of prefix_attention.py are tuned over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton

from gadcore.kernels.triton._shared import INTERPRETED, capability


def tile_config(BM: int, BN: int, num_warps: int, num_stages: int) -> triton.Config:
    """BM rows by BN keys."""
    return triton.Config({"BM": BM, "BN": BN}, num_warps=num_warps, num_stages=num_stages)


class Tiles(NamedTuple):
    """Configurations of a kernel that do not spill: for 16 bits by the padded head size, and the one for fp32.

    Exact fp32 products run on the FMA units, with operands in registers: their tiles are small.
    """

    by_width: dict[int, list[triton.Config]]
    single: triton.Config

    def fitting(self, width: int, itemsize: int) -> list[triton.Config]:
        if itemsize == 4:
            return [self.single]
        # Only sm_90 and sm_100 multiply out of shared memory; elsewhere operands take registers.
        few = self is D_QUERY and capability() // 10 not in (9, 10)
        return [config for config in self.by_width[width] if not few or config.kwargs["BM"] <= 64]

    def every(self) -> list[triton.Config]:
        return [*(config for configs in self.by_width.values() for config in configs), self.single]


_SMALL = tile_config(64, 64, 4, 2)
FORWARD = Tiles(
    {64: [tile_config(128, 128, 8, 2), _SMALL], 128: [tile_config(128, 64, 8, 3), _SMALL]}, tile_config(32, 32, 8, 1)
)
D_QUERY = Tiles({width: [tile_config(128, 64, 8, 2), _SMALL] for width in (64, 128)}, tile_config(16, 16, 8, 1))
D_KEY_VALUE = Tiles({64: [tile_config(32, 64, 4, 2)], 128: [tile_config(64, 64, 8, 2)]}, tile_config(32, 32, 4, 1))


def autotune(tiles: Tiles) -> Callable[[Any], Any]:
    """Over the tiles that fit; not anew for another number of tokens, since every step has another one.

    The interpreter, which cannot time anything, gets the first one alone.
    """

    def prune(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
        args = {**args, **kwargs}
        return tiles.fitting(args["WIDTH"], args["query"].element_size())

    return triton.autotune(
        configs=tiles.by_width[128][:1] if INTERPRETED else tiles.every(),
        key=["HEADS", "GROUP", "D", "WINDOWED"],
        prune_configs_by=None if INTERPRETED else {"early_config_prune": prune},
    )
