"""Matrices of few bits, written out entry by entry in Python's numbers."""

from __future__ import annotations

# arXiv 2305.14314, appendix E.
CODEBOOK = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def dynamic_codebook() -> list[float]:
    """256 values: of every power of ten from 1e-6 on twice as many as of the one before, in the middle of equal steps
    from a tenth of it to the whole; their negatives; 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps, power = 2**exponent, 10.0 ** (exponent - 6)
        edges = [0.1 + 0.9 * i / steps for i in range(steps + 1)]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            values += [power * (low + high) / 2, -power * (low + high) / 2]
    return values


def nearest(x: float, codebook: list[float]) -> float:
    return min(codebook, key=lambda value: abs(value - x))


def blocks(entries: list[float], size: int) -> list[list[float]]:
    return [entries[i : i + size] for i in range(0, len(entries), size)]


def nf4_values(rows: list[list[float]]) -> list[list[float]]:
    """What 4 bits keep of a matrix: blocks of 64 entries, their scales in 8 bits in blocks of 256."""
    flat = [x for row in rows for x in row]
    parts = blocks(flat, 64)
    scales = [max(map(abs, part)) for part in parts]
    mean, codebook = sum(scales) / len(scales), dynamic_codebook()
    read = []
    for group in blocks([s - mean for s in scales], 256):
        most = max(map(abs, group))
        read += [nearest(s / most, codebook) * most + mean for s in group]
    kept = [
        nearest(x / most, CODEBOOK) * scale for part, most, scale in zip(parts, scales, read, strict=True) for x in part
    ]
    return blocks(kept, len(rows[0]))


def int8_values(rows: list[list[float]]) -> list[list[float]]:
    """What 8 bits keep of a matrix, a scale for every row."""
    kept = []
    for row in rows:
        step = max(map(abs, row)) / 127
        kept.append([round(x / step) * step for x in row])
    return kept
