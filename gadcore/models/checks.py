"""What a model must be for gadcore to compute with it, found out by probes when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.data.groups import GroupedBatch
from gadcore.distributed.fsdp import local
from gadcore.errors import UserError, foreign
from gadcore.models.backbone import hidden_states
from gadcore.models.shallow import close, probe_batch, shallow

# Of older checkpoints: buffers that transformers computes itself today.
_COMPUTED = ("inv_freq", "masked_bias", "attention.bias", "attn.bias")


def check_weights(model: PreTrainedModel, info: Mapping[str, Any], path: str) -> None:
    """Raises UserError unless the weights at `path` are those that the model's settings describe, all of them finite.

    info: what from_pretrained() says of loading. Which weights may be missing is the caller's to know.
    """
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, expected = wrong[0]
        if name.startswith("score."):
            raise UserError(
                f"the model {path} has a head of {stored[0]} labels ({name}), the discriminator's has one: give a "
                "model without a head, or with a scalar one"
            )
        raise UserError(
            f"the weights of {path} do not fit its config.json: {name} is {list(stored)} and must be {list(expected)}"
            f"{f' ({len(wrong)} such weights)' if len(wrong) > 1 else ''}"
        )
    if errors := info.get("error_msgs"):
        raise UserError(f"cannot load the model {path}: {' '.join(str(errors[0]).split())}")
    # Heads of other kinds may stand beside; a layer without a place was part of what the model computed.
    backbone = model.base_model_prefix + "."
    spare = sorted(k for k in info["unexpected_keys"] if k.startswith(backbone) and not k.endswith(_COMPUTED))
    if spare:
        raise UserError(
            f"the weights of {path} do not fit its config.json, which has no place for {spare[:3]}: is a setting wrong "
            "there, for example num_hidden_layers?"
        )
    for name, parameter in model.named_parameters():
        # Both ends are NaN where anything is.
        here = local(parameter.detach())
        if here.numel() and not torch.stack(here.aminmax()).isfinite().all():
            raise UserError(f"the model {path} has NaN or infinite values in {name}: give one whose training went well")


def check_packing(model: PreTrainedModel, path: str) -> None:
    """Raises UserError unless the model computes for a packed group what it computes for its rows alone."""
    config = model.config.get_text_config()
    what = f"the model {path} ({model.config.model_type}) does not fit packed groups"
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(f"{what}: it caps its attention scores (attn_logit_softcapping)")
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{what}: its attention is not causal (use_bidirectional_attention)")
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{what}: it is no decoder whose backbone has its `layers` in a list, as Llama's has")
    if not len(layers):
        raise UserError(f"{what}: it has no layers (num_hidden_layers = {config.num_hidden_layers})")
    batch = probe_batch(model)
    with foreign(what), torch.no_grad(), shallow(model):
        packed = hidden_states(model, batch)
        for row, index in _rows(batch):
            alone = model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0]
            if not alone.isfinite().all():
                raise UserError(f"the model {path} computes hidden states that are NaN or infinite")
            if not close(packed[index], alone):
                raise UserError(
                    f"{what}: its hidden states differ from those of the rows alone; its attention does something "
                    "that neither a prefix layout nor position ids describe"
                )


def _rows(batch: GroupedBatch) -> list[tuple[Tensor, Tensor]]:
    """Every response behind its prompt: (token ids, where they lie in the packed row)."""
    offsets, prompt_of = batch.layout.offsets.tolist(), batch.layout.prompt_of.tolist()
    rows = []
    for k, prompt in enumerate(prompt_of):
        if k != prompt:
            index = [*range(offsets[prompt], offsets[prompt + 1]), *range(offsets[k], offsets[k + 1])]
            at = torch.tensor(index, device=batch.input_ids.device)
            rows.append((batch.input_ids[0, at], at))
    return rows


@torch.no_grad()
def check_head(model: PreTrainedModel, path: str) -> None:
    """Raises UserError unless the model's logits are its output head applied to the backbone's hidden states."""
    # Models that scale or cap their logits (Gemma 2, Cohere, Granite) would train on wrong log-probs.
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with foreign(f"the model {path} ({model.config.model_type}) does not compute as expected"), shallow(model):
        head = model.get_output_embeddings()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(ids, use_cache=False).logits
        expected = nn.functional.linear(hidden, head.weight, head.bias)
    text_config = model.config.get_text_config()
    # By name as well: a cap far above the logits of these few tokens would not show.
    changes = [getattr(text_config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    if any(c not in (None, 1, 1.0) for c in changes) or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"the model {path} ({model.config.model_type}) changes its logits after the output head "
            "(scaling or soft-capping): this is not supported"
        )
