"""Cases of the suite aot: attention, and what else a layer of a backbone computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from bench.offline.aot_cases import TOKENS, VOCABULARIES, WIDTHS, AotCase, Heads, Shape, meta


def backbone(quick: bool) -> Iterator[tuple[AotCase, Any]]:
    yield from _attention(quick)
    yield from _rotary(quick)
    yield from _rows_by_index(quick)
    yield from _norms(quick)


def _attention(quick: bool) -> Iterator[tuple[AotCase, Heads]]:
    """Head sizes and groupings of Llama-3 and Qwen2.5, of SmolLM2-135M, and of Phi-3-mini; Qwen2.5-3B at the lengths of
    the plan, and at long ones."""
    plan, long = Heads(16, 2, 128, P=300, R=400, N=8), Heads(16, 2, 128, P=2048, R=1536, N=8)
    variants = [("", plan, 0)]
    if not quick:
        variants += [
            ("", long, 0),
            ("", Heads(32, 8, 128), 0),
            ("", Heads(32, 8, 128, groups=4), 0),
            ("", Heads(28, 4, 128), 0),
            ("", Heads(9, 3, 64), 0),
            ("", Heads(32, 32, 96), 0),
            ("window", Heads(32, 8, 128), 512),
        ]
    for variant, heads, window in variants:
        name = f"D={heads.D}, {heads.query_heads} query heads over {heads.key_heads}"
        variant = ", ".join(filter(None, [name, variant]))
        # Exact fp32 products have tiles of their own, for each head size.
        single = heads in (plan, Heads(9, 3, 64), Heads(32, 32, 96)) and not quick
        for dtype in ("bfloat16", "float32") if single else ("bfloat16",):
            for op, call in (("forward", _attention_forward(window)), ("backward", _attention_backward(window))):
                yield AotCase(f"prefix_attention {op}", "triton", call, variant, dtype), heads


def _attention_inputs(heads: Heads, dtype: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any]]:
    """query, key, value; offsets, prompt_of."""
    import torch

    query, key = (meta(heads.T, count, heads.D, dtype=dtype) for count in (heads.query_heads, heads.key_heads))
    segments = heads.groups * (1 + heads.N)
    integers = (meta(segments + 1, dtype=torch.int64), meta(segments, dtype=torch.int64))
    return (query, key, torch.empty_like(key)), integers


def _numbers(heads: Heads, window: int) -> tuple[float, int, int, int, int]:
    """scale, window, longest, prompts, prompt_tokens."""
    return heads.D**-0.5, window, heads.P + heads.R, heads.groups, heads.groups * heads.P


def _attention_forward(window: int) -> Callable[[Heads, Any], None]:
    def call(heads: Heads, dtype: Any) -> None:
        from gadcore.kernels.triton import prefix_attention

        tensors, layout = _attention_inputs(heads, dtype)
        prefix_attention.forward(*tensors, *layout, *_numbers(heads, window))

    return call


def _attention_backward(window: int) -> Callable[[Heads, Any], None]:
    def call(heads: Heads, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import prefix_attention

        tensors, layout = _attention_inputs(heads, dtype)
        out = meta(heads.T, heads.query_heads, heads.D, dtype=dtype)
        lse = meta(heads.T, heads.query_heads, dtype=torch.float32)
        prefix_attention.backward(out, *tensors, out, lse, *layout, *_numbers(heads, window))

    return call


def _rotary(quick: bool) -> Iterator[tuple[AotCase, Heads]]:
    """Queries and keys of Llama-3 and of SmolLM2-135M, with cosines in float32, as under autocast."""
    for heads in [Heads(32, 8, 128)] if quick else [Heads(32, 8, 128), Heads(9, 3, 64), Heads(32, 32, 96)]:
        name = f"D={heads.D}, {heads.query_heads} and {heads.key_heads} heads"
        for dtype, back in itertools.product(("bfloat16", "float32"), (False, True)):
            yield AotCase("rotary", "triton", _rotate(back), f"{name}, backward" if back else name, dtype), heads


def _rotate(back: bool) -> Callable[[Heads, Any], None]:
    def call(heads: Heads, dtype: Any) -> None:
        import torch

        from gadcore.kernels.triton import rotary

        cos = meta(heads.T, heads.D, dtype=torch.float32)
        for count in (heads.query_heads, heads.key_heads):
            rotary.forward(meta(heads.T, count, heads.D, dtype=dtype), cos, cos, back)

    return call


def _rows_by_index(quick: bool) -> Iterator[tuple[AotCase, Shape]]:
    """The hidden states that predict response tokens."""
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        yield AotCase("take_rows", "triton", _take_rows, dtype=dtype), Shape(TOKENS[0], WIDTHS[0], VOCABULARIES[0])


def _take_rows(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import take_rows

    take_rows.backward(meta(shape.T, shape.H, dtype=dtype), meta(shape.T, dtype=torch.int64), shape.T)


def _norms(quick: bool) -> Iterator[tuple[AotCase, Shape]]:
    """Norms of a residual stream in float32 for products in bfloat16, as under autocast, and of bfloat16."""
    for width in WIDTHS[:1] if quick else WIDTHS:
        for dtype in ("float32", "bfloat16"):
            for op, call in (("forward", _norm_forward), ("backward", _norm_backward)):
                yield AotCase(f"rms_norm {op}", "triton", call, dtype=dtype), Shape(TOKENS[0], width, VOCABULARIES[0])


def _norm_forward(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import rms_norm

    x = meta(shape.T, shape.H, dtype=dtype)
    rms_norm.forward(x, meta(shape.H, dtype=torch.float32), 1e-6, 0.0, torch.bfloat16)


def _norm_backward(shape: Shape, dtype: Any) -> None:
    import torch

    from gadcore.kernels.triton import rms_norm

    x, grad = meta(shape.T, shape.H, dtype=dtype), meta(shape.T, shape.H, dtype=torch.bfloat16)
    weight, rstd = meta(shape.H, dtype=torch.float32), meta(shape.T, dtype=torch.float32)
    rms_norm.backward(grad, x, weight, rstd, 0.0)
