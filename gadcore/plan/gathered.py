"""What FSDP2 gathers beside the shards."""

from __future__ import annotations

from gadcore.plan.dimensions import Dimensions


def gathered_bytes(
    layer: int, root: int, compute: int, beside: float, *, outside: float | None = None, gradients: int | None = None
) -> float:
    """Whole weights of FSDP2 beside the shards: of the root throughout, of two layers, and a layer's whole gradient.

    compute: bytes of a number of a layer as it is gathered, in the dtype of products; outside: of all of embedding,
    norm and head, gradients: of a number; default as layers. They are reduced in float32. At the end of the backward
    pass, when what was kept (`beside`) is gone, the root has its weights, its gradient and the copy that is reduced.
    """
    around = float(compute * root) if outside is None else outside
    made = compute if gradients is None else gradients
    during = around + (2 * compute + made) * layer + (4 * layer if made < 4 else 0)
    return max(during, around + root * (made + 4) - beside)


def outside_bytes(d: Dimensions, root: int, weights: int, *, narrow_head: bool) -> float:
    """Bytes of what is outside of layers as it is gathered. root: its parameters; weights: bytes of one.

    narrow_head: an untied head is gathered in bfloat16, as autocast's products read it.
    """
    narrow = d.head if narrow_head and not d.tied else 0
    return float(weights * (root - narrow) + 2 * narrow)
