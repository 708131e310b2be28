"""cpu_decode_layer against the layer and the cache written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gadcore.kernels.cpu.linear_few_rows import Adapters
from tests.support.kernel_grid import F64

pytestmark = pytest.mark.native

HEADS, KEY_HEADS, WIDTH, BLOCK, HIDDEN, INNER = 6, 2, 32, 32, 40, 56
EPS = 1e-5, 1e-6
RANK = 3
# Of the layer's weights, those of its products.
OF_PRODUCT = 1, 2, 4, 5


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).float()


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [M, heads, D], cos_sin [M, D]."""
    cos, sin = (part[:, None] for part in cos_sin.chunk(2, dim=-1))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def cached(cache: Tensor, blocks: Tensor, head: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [length, D] of a request and key head."""
    both = cache[blocks, head].reshape(len(blocks), 2, -1)
    keys = both[:, 0].reshape(-1, WIDTH, BLOCK).mT.flatten(0, 1)
    values = both[:, 1].reshape(-1, BLOCK, WIDTH).flatten(0, 1)
    return keys[:length], values[:length]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def problem(biased: bool, adapted: Sequence[int] = ()) -> dict[str, Any]:
    """Three requests that see 71, 64 and 5 tokens, the one of this step among them; two share a block."""
    lengths = torch.tensor([71, 64, 5], dtype=torch.int32)
    table = torch.tensor([[3, 1, 6], [3, 5, 0], [2, 0, 0]], dtype=torch.int32)
    widths = (HEADS + 2 * KEY_HEADS) * WIDTH, HIDDEN, 2 * INNER, HIDDEN
    # Columns that have an adapter of their own, of a product: queries and values, not keys; gate and up; all of it.
    members = (
        [(0, HEADS * WIDTH), ((HEADS + KEY_HEADS) * WIDTH, widths[0])],
        [(0, HIDDEN)],
        [(0, INNER), (INNER, 2 * INNER)],
        [(0, HIDDEN)],
    )
    depths = HIDDEN, HEADS * WIDTH, HIDDEN, INNER
    products = [randn(n, k, seed=n + k) / k**0.5 for n, k in zip(widths, depths, strict=True)]
    norms = [randn(HIDDEN, seed=i) for i in (1, 2)]
    positions = lengths.long() - 1
    return {
        "hidden": randn(3, HIDDEN, seed=3),
        "residual": randn(3, HIDDEN, seed=4),
        "positions": positions,
        "cos_sin": randn(80, WIDTH, seed=5),
        "weights": [norms[0], *products[:2], norms[1], *products[2:]],
        "biases": [randn(n, seed=n) if biased else None for n in widths],
        "kv_cache": randn(7, KEY_HEADS, BLOCK, 2 * WIDTH, seed=6),
        "table": table,
        "lengths": lengths,
        "slots": table[torch.arange(3), positions // BLOCK].long() * BLOCK + positions % BLOCK,
        "scale": 0.2,
        "adapters": {
            i: Adapters(
                randn(RANK * len(members[i]), depths[i], seed=20 + i) / depths[i] ** 0.5,
                [randn(end - start, RANK, seed=30 + start) for start, end in members[i]],
                [start for start, _ in members[i]],
                0.5 + i / 4,
            )
            for i in adapted
        },
    }


def truth(p: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The two results and the cache, float64."""
    weights = [w.to(F64) for w in p["weights"]]
    for i, adapters in p["adapters"].items():
        weight = weights[OF_PRODUCT[i]]
        downs = adapters.down.to(F64).split(RANK)
        for a, b, start in zip(downs, adapters.ups, adapters.starts, strict=True):
            weight[start : start + len(b)] += adapters.scale * b.to(F64) @ a
    cache = p["kv_cache"].to(F64).clone()

    def product(x: Tensor, weight: int, bias: int) -> Tensor:
        y = x @ weights[weight].T
        return y if p["biases"][bias] is None else y + p["biases"][bias].to(F64)

    total = p["hidden"].to(F64) + (0 if p["residual"] is None else p["residual"].to(F64))
    qkv = product(norm(total, weights[0], EPS[0]), 1, 0).unflatten(1, (-1, WIDTH))
    query, key, value = qkv.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
    angles = p["cos_sin"].to(F64)[p["positions"]]
    query, key = rotated(query, angles), rotated(key, angles)
    for m, slot in enumerate(p["slots"].tolist()):
        for h in range(KEY_HEADS):
            place = cache[slot // BLOCK, h].view(2, -1)
            place[0].view(WIDTH, BLOCK)[:, slot % BLOCK] = key[m, h]
            place[1].view(BLOCK, WIDTH)[slot % BLOCK] = value[m, h]
    attended = torch.empty_like(query)
    for m, length in enumerate(p["lengths"].tolist()):
        for h in range(HEADS):
            keys, values = cached(cache, p["table"][m].long(), h * KEY_HEADS // HEADS, length)
            attended[m, h] = (p["scale"] * keys @ query[m, h]).softmax(0) @ values
    after = total + product(attended.flatten(1), 2, 1)
    gate, up = product(norm(after, weights[3], EPS[1]), 4, 2).chunk(2, dim=-1)
    return product(torch.nn.functional.silu(gate) * up, 5, 3), after, cache


def run(p: dict[str, Any], **beside: Any) -> tuple[Tensor, Tensor, Tensor]:
    """beside: arguments about adapters that take the place of the problem's."""
    cache = p["kv_cache"].clone()
    adapters = list(p["adapters"].values())
    given = {
        "downs": [p["adapters"][i].down if i in p["adapters"] else None for i in range(4)],
        "ups": [b for each in adapters for b in each.ups],
        "starts": [start for each in adapters for start in each.starts],
        "scales": [p["adapters"][i].scale if i in p["adapters"] else 0.0 for i in range(4)],
    }
    hidden, after = torch.ops.gadcore.cpu_decode_layer(
        *(p["hidden"], p["residual"], p["positions"], p["cos_sin"], p["weights"], p["biases"], *EPS, cache),
        *(p["table"], p["lengths"], p["slots"], p["scale"]),
        **(given | beside),
    )
    return hidden, after, cache


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_against_float64(biased: bool, first: bool) -> None:
    p = problem(biased)
    if first:
        p["residual"] = None
    given = p["hidden"].clone()
    for actual, expected in zip(run(p), truth(p), strict=True):
        torch.testing.assert_close(actual.to(F64), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(p["hidden"], given)


@pytest.mark.parametrize("adapted", [(0, 1, 2, 3), (0,), (1, 3), (2,)])
def test_adapters_against_float64(adapted: Sequence[int]) -> None:
    p = problem(biased=True, adapted=adapted)
    for actual, expected in zip(run(p), truth(p), strict=True):
        torch.testing.assert_close(actual.to(F64), expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(run(p)[0], run(problem(biased=True))[0], rtol=1e-2)


def test_a_product_adds_to_y_what_the_layer_adds() -> None:
    adapters = problem(biased=False, adapted=(0,))["adapters"][0]
    x, weight = randn(5, HIDDEN, seed=7), problem(biased=False)["weights"][1]
    y = adapters.add_to((x @ weight.T)[None], (x @ adapters.down.T)[None])
    whole = weight.clone()
    for a, b, start in zip(adapters.down.split(RANK), adapters.ups, adapters.starts, strict=True):
        whole[start : start + len(b)] += adapters.scale * b @ a
    torch.testing.assert_close(y, (x @ whole.T)[None], rtol=1e-5, atol=1e-5)


def test_a_token_without_a_slot_is_kept_nowhere() -> None:
    p = problem(biased=False)
    p["slots"][1] = -1
    cache = run(p)[2]
    changed = (cache != p["kv_cache"]).flatten(1).any(1)
    # Blocks of the first and of the last request's token.
    assert changed.nonzero().flatten().tolist() == [2, 6]


def test_what_is_refused() -> None:
    good = problem(biased=False)
    norm_before, of_qkv, *others = good["weights"]

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            run({**good, **changed})

    refused("kv_cache must be contiguous float32", kv_cache=good["kv_cache"].double())
    refused("with an even D", kv_cache=torch.empty(7, KEY_HEADS, BLOCK, 6))
    refused(
        r"qkv must be contiguous float32 \[M, \(Hq \+ 2 \* 2\) \* 32\]",
        weights=[norm_before, of_qkv[: 4 * WIDTH], *others],
    )
    refused(r"positions and slots must be contiguous int64 \[3\]", positions=good["positions"].int())
    refused(r"positions and slots must be contiguous int64 \[3\]", slots=good["slots"][:2])
    refused(r"cos_sin must be contiguous float32 \[positions, 32\]", cos_sin=good["cos_sin"][:, :16])
    refused(r"positions\[0\] must be 0 to 69, is 70", cos_sin=good["cos_sin"][:70])
    refused(r"slots\[2\] must be below 224, is 224", slots=torch.tensor([1, 2, 224]))
    refused("takes 6 weights and 4 biases, got 5 and 4", weights=good["weights"][:5])


def test_adapters_that_are_refused() -> None:
    p = problem(biased=False, adapted=(0, 1))
    ups, starts = [b for each in p["adapters"].values() for b in each.ups], [0, (HEADS + KEY_HEADS) * WIDTH, 0]

    def refused(match: str, **beside: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            run(p, **beside)

    refused("takes 4 A .or None., 4 scales and as many starts as B, got 4, 3, 3 and 3", scales=[1.0] * 3)
    refused("got 4, 4, 2 and 3", starts=starts[:2])
    refused("product 1 has a matrix A of 3 rows and not as many columns of B", ups=ups[:2], starts=starts[:2])
    refused("1 matrices B stand beside no product", ups=[*ups, ups[-1]], starts=[*starts, 0])
    refused(r"B \[64, 3\] from column 257 on does not fit 320 columns", starts=[0, 257, 0])
    refused("A has 6 rows, and all B have 7 columns", ups=[torch.zeros(HEADS * WIDTH, 7), *ups[1:]])
    refused(r"B must be \[N, rank\], is \[192, 0\]", ups=[torch.zeros(HEADS * WIDTH, 0), *ups[1:]])
