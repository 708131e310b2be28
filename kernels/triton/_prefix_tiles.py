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
    """Configurations of a kernel that do not spill.

    by_arch: for 16 bits, by generation (9: sm_90, 10: sm_100, OLDER: all others) and padded head size. single: for
    fp32, in the same way.
    """

    by_arch: dict[int, dict[int, list[triton.Config]]]
    single: dict[int, dict[int, list[triton.Config]]]

    def fitting(self, width: int, itemsize: int) -> list[triton.Config]:
        found = self.single if itemsize == 4 else self.by_arch
        return found.get(capability() // 10, found[OLDER])[width]

    def every(self) -> list[triton.Config]:
        targets = [*self.by_arch.values(), *self.single.values()]
        return list(dict.fromkeys(config for widths in targets for configs in widths.values() for config in configs))


OLDER = 0
_SMALL = tile_config(64, 64, 4, 2)
_FORWARD = {64: [tile_config(128, 128, 8, 2), _SMALL], 128: [tile_config(128, 64, 8, 3), _SMALL]}
_SINGLE = {width: [tile_config(32, 32, 8, 1)] for width in (64, 128)}
FORWARD = Tiles({OLDER: _FORWARD}, {OLDER: _SINGLE})
# Only sm_90 and sm_100 multiply out of shared memory; elsewhere operands take registers.
_D_QUERY = {width: [tile_config(128, 64, 8, 2), _SMALL] for width in (64, 128)}
D_QUERY = Tiles(
    {OLDER: {width: [_SMALL] for width in (64, 128)}, 9: _D_QUERY, 10: _D_QUERY},
    # Exact fp32 products run on the FMA units, with operands in registers: their tiles are small. By eight warps the
    # larger one spills on sm_100.
    {OLDER: {64: [tile_config(32, 16, 4, 1)], 128: [tile_config(16, 16, 8, 1)]}},
)
# sm_90: 128 keys, a half for each of two warpgroups, whose probabilities go from registers into the products with them;
# rows are read half as often as by 64 keys. More rows spill where D is 128, and as many keys do on other targets.
D_KEY_VALUE = Tiles(
    {
        OLDER: {64: [tile_config(32, 64, 4, 2)], 128: [tile_config(64, 64, 8, 2)]},
        9: {64: [tile_config(64, 128, 8, 2)], 128: [tile_config(32, 128, 8, 2)]},
    },
    # 32 rows of 128 numbers spill on sm_80, 16 of them on sm_90.
    {OLDER: {64: _SINGLE[64], 128: [tile_config(16, 32, 8, 1)]}, 9: _SINGLE, 10: _SINGLE},
)


def autotune(tiles: Tiles) -> Callable[[Any], Any]:
    """Over the tiles that fit; not anew for another number of tokens, since every step has another one.

    The interpreter, which cannot time anything, gets the first one of sm_90 alone.
    """
    hopper = tiles.by_arch.get(9, tiles.by_arch[OLDER])[128][:1]

    def prune(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
        args = {**args, **kwargs}
        return tiles.fitting(args["WIDTH"], args["query"].element_size())

    return triton.autotune(
        configs=hopper if INTERPRETED else tiles.every(),
        key=["HEADS", "GROUP", "D", "WINDOWED"],
        prune_configs_by=None if INTERPRETED else {"early_config_prune": prune},
    )
