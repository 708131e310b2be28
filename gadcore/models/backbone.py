"""Packed groups through any Hugging Face decoder: attention registry and position ids, no patched model files.

After use_packed_attention() a model attends by kernels/prefix_attention where a call brings the layout of a
GroupedBatch along, and as transformers' "sdpa" otherwise, so generate() and ordinary calls work as ever.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gadcore.data.groups import Cost, GroupedBatch
from gadcore.kernels.last_token_attention import last_token_attention
from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.prefix_attention import prefix_attention
from gadcore.kernels.quantised_linear import layers_of_bits
from gadcore.kernels.take_rows import take_rows
from gadcore.models.shallow import close, decoder_layers, probe_batch, shallow

ATTENTION = "gadcore"


@dataclass(frozen=True)
class _Few:
    """Tokens whose results are read of a layer: index [S] int64, ascending; key and value [1, Hk, T, D] of all tokens.

    last: they are the last tokens of all responses.
    """

    index: Tensor
    last: bool
    key: Tensor
    value: Tensor


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    prefix_layout: PrefixLayout | None = None,
    few: _Few | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key and value [1, Hk, T, D] -> [1, T, Hq, D].

    few: where the layer computes its queries for a few of the T tokens alone.
    """
    if prefix_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    key, value = (few.key, few.value) if few else (key, value)
    # Under autocast the value is a product's result, while a norm or a rotation by float32 cosines widened the others.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if few is None:
        out = prefix_attention(q, k, v, prefix_layout, scale=scaling, window=sliding_window)
    elif few.last:
        out = last_token_attention(q, k, v, prefix_layout, scale=scaling, window=sliding_window)
    else:
        # Queries of 0 for the others: the attention is the smaller part of a layer, and nobody reads theirs.
        everyone = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, few.index, q)
        out = prefix_attention(everyone, k, v, prefix_layout, scale=scaling, window=sliding_window)
        out = out.index_select(0, few.index)
    return out[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Lets `model` take packed batches; once is enough."""
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)


def hidden_states(model: PreTrainedModel, batch: GroupedBatch) -> Tensor:
    """Hidden states [T, H] after the final norm of all tokens of a packed batch."""
    return _forward(model, batch)


def last_hidden_states(model: PreTrainedModel, batch: GroupedBatch) -> Tensor:
    """Hidden states [U, H] after the final norm of the last token of each packed response.

    After prune_last_layer() the last layer computes queries, output projection and MLP for these tokens alone.
    """
    if is_pruned(model):
        return _forward(model, batch, only=(batch.last_index, True))
    return _forward(model, batch).index_select(0, batch.last_index)


def predicting_states(model: PreTrainedModel, batch: GroupedBatch) -> Tensor:
    """Hidden states [R, H] after the final norm of the tokens that predict the response tokens; pruned as above."""
    if is_pruned(model):
        return take_rows(_forward(model, batch, only=(batch.predicting, False)), batch.predicted_by)
    # A prompt's last token predicts the first one of each of its samples: its row is read more than once.
    return take_rows(_forward(model, batch), batch.predicting[batch.predicted_by])


def _forward(model: PreTrainedModel, batch: GroupedBatch, **kwargs: Any) -> Tensor:
    # transformers hands a 4-d mask through as it is: this one keeps it from building one that nobody reads.
    mask = torch.empty(1, 1, 1, 1, device=batch.input_ids.device)
    out = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.layout.positions[None],
        use_cache=False,
        prefix_layout=batch.layout,
        **kwargs,
    )
    return out.last_hidden_state[0]


def prune_last_layer(model: PreTrainedModel) -> bool:
    """Lets last_hidden_states() and predicting_states() skip what they do not read in the last layer, where its
    structure is known; copies of the model do the same.

    True where they do from now on; False where the layer is built in another way or computes something else then, and
    stays as it is.
    """
    if is_pruned(model):
        return True
    # The toys of the paper's mixtures have no layer.
    layer = next(reversed(decoder_layers(model)), None)
    attention = getattr(layer, "self_attn", None)
    known = hasattr(layer, "input_layernorm") and all(
        isinstance(getattr(attention, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    if layer is None or not known:
        return False
    batch, reads = probe_batch(model), (last_hidden_states, predicting_states)
    with torch.no_grad(), shallow(model):
        expected = [read(model, batch) for read in reads]
        hook = layer.register_forward_pre_hook(_few_tokens_only, with_kwargs=True)
        try:
            same = all(close(read(model, batch), states) for read, states in zip(reads, expected, strict=True))
        except ValueError:
            # The model attends by another layout than that of the batch.
            same = False
    if not same:
        hook.remove()
    return same


def prune_as(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Prunes a model of the kind of `other` where that one has been found to be one that can be."""
    if is_pruned(other) and not is_pruned(model):
        decoder_layers(model)[-1].register_forward_pre_hook(_few_tokens_only, with_kwargs=True)


def is_pruned(model: PreTrainedModel) -> bool:
    """Whether prune_last_layer() has found that the last layer can be pruned."""
    layers = decoder_layers(model)
    return len(layers) > 0 and _few_tokens_only in layers[-1]._forward_pre_hooks.values()


def _few_tokens_only(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The layer is called with the hidden states of a few tokens, and the keys and values of all."""
    only = kwargs.pop("only", None)
    if only is None:
        return None
    index, last = only
    hidden, attention = args[0], layer.self_attn
    cos, sin = kwargs["position_embeddings"]
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    key, value = (project(normed).view(shape) for project in (attention.k_proj, attention.v_proj))
    key, value = getattr(attention, "k_norm", nn.Identity())(key).transpose(1, 2), value.transpose(1, 2)
    if getattr(attention, "use_rope", True):
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        _, key = rotate(key[:, :0], key, cos, sin)
    at = dict(position_embeddings=(cos.index_select(1, index), sin.index_select(1, index)))
    at["position_ids"] = kwargs["position_ids"].index_select(1, index)
    return (hidden.index_select(1, index), *args[1:]), {**kwargs, **at, "few": _Few(index, last, key, value)}


def cost_of(model: PreTrainedModel) -> Cost:
    """Multiply-adds of the layers' matrices per token, and of attention per (query, key) pair."""
    config = model.config.get_text_config()
    layers = decoder_layers(model)
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    # Two entries of a matrix may lie in a byte.
    few = layers_of_bits(layers).values()
    matrices += sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in few)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(matrices, 2 * config.num_hidden_layers * config.num_attention_heads * head_dim)
