"""Attention of vLLM's decoding steps on a CPU, with the blocks that the samples of a prompt share read once.

vLLM keeps a prompt's full blocks of keys and values once for all its samples, but its attention reads them again for
every sample. csrc/cpu/decode_attention.cpp takes the samples together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gadcore.kernels.cpu import native

# What the kernel takes: heads and blocks in multiples of this.
_UNIT = 32


def share_prompts_in_decoding(runner: Any) -> int:
    """Installs cpu_decode_attention in the attention layers of vLLM's CPU model runner; returns in how many.

    It serves steps in which every request decodes one token; all others keep vLLM's kernel, and so do layers that are
    not plain causal float32 attention and layers whose cache is laid out in another way than the op reads it.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    if not native.available("cpu_decode_attention"):
        return 0
    count = 0
    probed: dict[tuple[Any, ...], bool] = {}
    for layer in runner.vllm_config.compilation_config.static_forward_context.values():
        # Subclasses may compute something else.
        if type(layer) is not Attention or type(layer.impl) is not CPUAttentionBackendImpl or not _is_plain(layer):
            continue
        impl = layer.impl
        case = (layer.isa, impl.num_heads, impl.num_kv_heads, impl.head_size, layer.kv_cache.shape[2])
        if case not in probed:
            probed[case] = _agrees(layer)
        if probed[case]:
            impl.forward = _forward(impl)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(layer: Any) -> bool:
    from vllm.v1.attention.backend import AttentionType

    impl, cache = layer.impl, layer.kv_cache
    return (
        impl.attn_type == AttentionType.DECODER
        and impl.alibi_slopes is None
        and impl.sliding_window == -1
        and impl.logits_soft_cap == 0
        and impl.sinks is None
        and impl.kv_sharing_target_layer_name is None
        and impl.kv_cache_dtype in ("auto", "float32")
        and isinstance(cache, Tensor)
        and cache.dtype == torch.float32
        and cache.dim() == 4
        and cache.shape[1] == impl.num_kv_heads
        and cache.shape[2] % _UNIT == 0
        and cache.shape[3] == 2 * impl.head_size
        and impl.head_size % _UNIT == 0
    )


def _halves(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [blocks, heads, block, head size] of vLLM's cache [blocks, heads, block, 2 * head size]."""
    blocks, heads, block, _ = cache.shape
    keys, values = cache.view(blocks, heads, 2 * block, -1).chunk(2, dim=2)
    return keys, values


def is_installed(impl: Any) -> bool:
    """Whether an attention layer's implementation takes cpu_decode_attention where it fits."""
    return "forward" in vars(impl)


def only_decodes(step: Any) -> bool:
    """Whether every request of a step, by its attention's metadata, decodes one token."""
    return (
        step is not None
        and step.max_query_len == 1
        and step.num_actual_tokens == len(step.seq_lens)
        and step.dynamic_causal is None
    )


def _forward(impl: Any) -> Any:
    theirs, ours = impl.forward, torch.ops.gadcore.cpu_decode_attention.default

    def forward(
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if (
            not only_decodes(attn_metadata)
            or query.dtype != torch.float32
            or output.dtype != torch.float32
            or output_scale is not None
            or output_block_scale is not None
        ):
            return theirs(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        count = attn_metadata.num_actual_tokens
        keys, values = _halves(kv_cache)
        table, lengths = attn_metadata.block_table, attn_metadata.seq_lens
        ours(query[:count], keys, values, table, lengths, impl.scale, output[:count])
        return output

    return forward


def _agrees(layer: Any) -> bool:
    """Whether the op finds in a cache what vLLM has put there, as vLLM's own attention does."""
    from vllm import _custom_ops as ops

    impl = layer.impl
    block, size, heads = layer.kv_cache.shape[2], impl.head_size, impl.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    # Two requests with one block in common, one that ends a block and one that does not.
    table = torch.tensor([[3, 1], [3, 2]], dtype=torch.int32)
    lengths = torch.tensor([2 * block, block + 5], dtype=torch.int32)
    cache = torch.zeros(4, heads, block, 2 * size)
    keys, values = _halves(cache)
    key, value = torch.randn(2, 3 * block, heads, size, generator=generator)
    query = torch.randn(2, impl.num_heads, size, generator=generator)
    slots = torch.arange(block, 4 * block)
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, layer.isa)
    starts = torch.arange(3, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=2,
        num_heads=impl.num_heads,
        num_kv_heads=heads,
        head_dim=size,
        seq_lens=lengths,
        dtype=torch.float32,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=False,
    )
    theirs, ours = torch.empty_like(query), torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=keys,
        value_cache=values,
        output=theirs,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=impl.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
    )
    torch.ops.gadcore.cpu_decode_attention.default(query, keys, values, table, lengths, impl.scale, ours)
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
