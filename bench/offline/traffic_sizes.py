"""Shapes of the suite traffic, and what one op of it is measured as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCALE = 4.3
TEMPERATURE, CLIP, KL = 1.0, 0.2, 0.001

# Programs of a kernel that an H100's SM holds at once, from the suite aot; 1 where not named.
RESIDENT = {
    "_combine_kernel": 16,
    "_rows_kernel": 4,
    "_ratio_kernel": 16,
    "_backward_kernel": 2,
    "_attention_kernel": 1,
    "_d_query_kernel": 1,
    "_d_key_value_kernel": 1,
    "_sum_parts_kernel": 7,
    "_selective_log_softmax_kernel": 25,
    "_grpo_loss_fwd_kernel": 25,
    "_grpo_loss_bwd_kernel": 4,
}


@dataclass(frozen=True)
class Sizes:
    """T, H, V of the head; rows: sequences of the GRPO loss; bt_*, group: of bt_score, group with its teacher.

    attention: tokens of the prompt and of a response, query heads, key heads, head size; `group` responses.
    """

    T: int
    H: int
    V: int
    rows: int
    bt_tokens: int
    bt_width: int
    bt_groups: int
    group: int
    cache_bytes: int
    attention: tuple[int, int, int, int, int]
    grid: tuple[int, int, int, int]  # T, H, V, and bytes of L2, of the op that runs on production's grid

    @classmethod
    def of(cls, quick: bool) -> Sizes:
        if quick:
            return cls(256, 128, 5440, 2, 512, 256, 4, 9, 1 << 20, (48, 24, 4, 2, 64), (256, 128, 10880, 128 << 10))
        return cls(
            1024,
            832,
            35264,
            4,
            8192,
            3584,
            16,
            9,
            50 << 20,
            (256, 128, 8, 2, 128),
            (4096, 256, 151936, (50 << 20) // 14),
        )


@dataclass(frozen=True)
class Measured:
    """One op of one side. minimum: bytes. error: relative, of the worst output; None for what is not compared."""

    op: str
    impl: str
    shape: str
    minimum: int
    rows: list[Any]
    error: float | None
    limited: bool
