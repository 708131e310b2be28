"""Decoder layers of vLLM on a CPU as one function each, and as one native call where every request decodes one token.

Of a decoding step of a small model, calls of modules and of operations take as long as its attention: a layer of
Llama's is twelve modules. What is computed stays the same, by the same kernels (csrc/cpu/decode_layer.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gadcore.cpu.decode_attention import is_installed, only_decodes
from gadcore.kernels.cpu import native
from gadcore.kernels.cpu.linear_few_rows import MAX_ROWS, Adapters

Layer = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
_OPS = ("cpu_rms_norm", "cpu_swiglu")


def shorten_layers(model: nn.Module) -> int:
    """Gives every Llama or Qwen2 layer of float32 that is built in the usual way one function; returns how many.

    Models of other families, and layers that are quantised or shared out over devices, keep vLLM's own. Steps in which
    every request decodes one token become one native call a layer, where cpu_decode_attention is installed by then.
    """
    from vllm.model_executor.layers.attention import Attention

    if not all(map(native.available, _OPS)):
        return 0
    layers = [layer for layer in model.modules() if _fits(layer)]
    for layer in layers:
        layer.forward = _forward(layer)
    for module in model.modules():
        if type(module) is Attention:
            # Else every call goes through torch's dispatcher, for the sake of graphs that nobody captures here.
            module.use_direct_call = True
    return len(layers)


def _fits(layer: Any) -> bool:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.models import llama, qwen2

    if type(layer) not in (llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    return (
        type(attention) in (llama.LlamaAttention, qwen2.Qwen2Attention)
        and not getattr(attention, "qk_norm", False)
        and type(attention.attn) is Attention
        and type(mlp) in (llama.LlamaMLP, qwen2.Qwen2MLP)
        and all(map(_plain, (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)))
        and all(
            type(norm) is RMSNorm and norm.variance_size_override is None and norm.has_weight
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
    )


def _plain(part: Any) -> bool:
    """Whether a linear layer is nothing but a product with its weight, in float32, plus its bias."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    # vLLM's LoRA layers hand on what they are asked for to the layer that they wrap: it would compute alone.
    if hasattr(part, "lora_a_stacked"):
        return False
    whole = type(part.quant_method) is UnquantizedLinearMethod and part.tp_size == 1 and not part.skip_bias_add
    return whole and part.weight.dtype == torch.float32


def _forward(layer: Any) -> Layer:
    norm, swiglu = torch.ops.gadcore.cpu_rms_norm.default, torch.ops.gadcore.cpu_swiglu.default
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    qkv_proj, o_proj, gate_up_proj, down_proj = map(
        _product, (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    )
    rotate, attend = attention.rotary_emb._forward_method, attention.attn
    decode = _decode(layer)

    def forward(positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        decoded = decode(positions, hidden_states, residual)
        if decoded is not None:
            return decoded
        total = hidden_states if residual is None else hidden_states + residual
        normed, _ = norm(total, before.weight.data, before.variance_epsilon, 0.0)
        query, key, value = qkv_proj(normed).split(sizes, dim=-1)
        query, key = rotate(positions, query, key)
        total = total + o_proj(attend(query, key, value))
        normed, _ = norm(total, after.weight.data, after.variance_epsilon, 0.0)
        gate, up = gate_up_proj(normed).chunk(2, dim=-1)
        return down_proj(swiglu(gate, up)), total

    return forward


def _decode(layer: Any) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor] | None]:
    """The layer in a step that one native call serves; None in all others."""
    from vllm.model_executor.layers.attention.attention import get_attention_context

    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    products = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    qkv_proj, o_proj, gate_up_proj, down_proj = products
    attend, rotary = attention.attn, attention.rotary_emb
    if not (native.available("cpu_decode_layer") and _rotates_halves(rotary, attend.head_size)):
        return lambda *_: None
    # It reads weights itself, so it has to know what a layer's product computes beside them.
    beside: list[Adapters | None] = [getattr(part.cpu_linear, "adapters", None) for part in products]
    decode, name = torch.ops.gadcore.cpu_decode_layer.default, attend.layer_name

    def forward(positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if len(hidden) > MAX_ROWS or not is_installed(attend.impl):
            return None
        step: Any
        step, _, cache, slots = get_attention_context(name)
        if not only_decodes(step) or slots is None or len(slots) != len(hidden) or len(step.seq_lens) != len(hidden):
            return None
        weights = [part.weight.data for part in (before, qkv_proj, o_proj, after, gate_up_proj, down_proj)]
        biases = [None if part.bias is None else part.bias.data for part in products]
        return decode(  # type: ignore[no-any-return]
            hidden,
            residual,
            positions,
            rotary.cos_sin_cache,
            weights,
            biases,
            before.variance_epsilon,
            after.variance_epsilon,
            cache,
            step.block_table,
            step.seq_lens,
            slots,
            attend.impl.scale,
            [None if each is None else each.down for each in beside],
            [up for each in beside if each is not None for up in each.ups],
            [start for each in beside if each is not None for start in each.starts],
            [0.0 if each is None else each.scale for each in beside],
        )

    return forward


def _rotates_halves(rotary: Any, head_size: int) -> bool:
    """Whether queries and keys are rotated by the angles of a table, all of a head, its halves against each other."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

    whole = rotary.is_neox_style and rotary.rotary_dim == rotary.head_size == head_size
    return type(rotary) in (RotaryEmbedding, Llama3RotaryEmbedding) and whole and head_size % 2 == 0


def _product(part: Any) -> Callable[[Tensor], Tensor]:
    product, bias = part.cpu_linear, part.bias

    def forward(x: Tensor) -> Tensor:
        # .data: vLLM's classes of parameters take every operation through Python.
        return product(x, part.weight.data, None if bias is None else part.bias.data)  # type: ignore[no-any-return]

    return forward
