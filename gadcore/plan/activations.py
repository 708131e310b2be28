"""Bytes that a forward pass keeps for the backward pass: by formula, and by a run of the real code on fake tensors.

The formula counts what the layers of gadcore keep of every packed token (gadcore/models/backbone.py, fused.py):

    input and its norm, twice       of the residual stream, [hidden] each
    query, key, value, out          rotated, with one number a head
    gate, up, their product         [mlp] each

On the CPU norms and the product are made again (cpu/recompute.py). Under autocast the stream stays float32, and a
product keeps the cast of its input: on the CPU each its own, on CUDA those that read the same norm keep one.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.models.activations import Mode, set_mode
from gadcore.models.backbone import hidden_states, use_packed_attention
from gadcore.models.fused import fuse_backbone
from gadcore.plan.dimensions import Dimensions

_PROBE_TOKENS = 64


def layer_bytes(d: Dimensions, mode: Mode, *, autocast: bool, item: int = 4, again: bool = True) -> int:
    """Bytes that one layer keeps of one packed token. item: bytes of a number; under autocast of the stream's.

    again: whether mode "off" makes norms and gated activations again, as on the CPU.
    """
    narrow = 2 if autocast else item
    if mode == "full":
        return item * d.hidden
    if mode == "selective":
        products = d.query + 2 * d.key + 2 * d.hidden + 2 * d.mlp
        return item * d.hidden + narrow * (products + d.query) + 4 * d.heads
    # Five products read the two norms.
    normed = narrow * (5 if again else 2) * d.hidden if autocast else 0 if again else item * 2 * d.hidden
    attention = narrow * (2 * d.query + 2 * d.key) + 4 * d.heads
    return item * 2 * d.hidden + 8 + normed + attention + narrow * (2 if again else 3) * d.mlp


def kept_bytes(d: Dimensions, mode: Mode, tokens: float, *, autocast: bool, item: int = 4, again: bool = True) -> float:
    """Bytes that all layers keep of `tokens` packed tokens, the layer that is computed again included."""

    def layer(which: Mode, again: bool) -> float:
        return layer_bytes(d, which, autocast=autocast, item=item, again=again) * d.kept_scale.get(which, 1.0)

    # A layer that is computed again keeps everything meanwhile.
    kept = d.layers * layer(mode, again) + (0.0 if mode == "off" else layer("off", again=False))
    # The last norm's input, the rotation that all layers share, and the token's own id.
    return tokens * (kept + item * (d.hidden + 2 * d.query // d.heads) + 12)


class _Agree(TorchFunctionMode):
    """Fake tensors have no values to compare: which of two norms it is does not change what is kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.allclose else func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in known:
                    self._take(storage)
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.bytes += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def fake_layer_bytes(config: PreTrainedConfig, mode: Mode) -> float:
    """Bytes that one layer of the real code keeps of one packed token, in float32 without autocast.

    The models have two and four layers of full width, on fake tensors: nothing is computed and no memory taken. What
    one more layer keeps is half of the difference; where layers alternate in kind, both models have both.
    """
    two, four = (_kept(config, layers, mode) for layers in (2, 4))
    return (four - two) / 2 / _PROBE_TOKENS


def with_layers(config: PreTrainedConfig, layers: int, **changes: object) -> PreTrainedConfig:
    """The same settings with another number of layers; lists with an entry a layer are repeated or cut."""
    values = config.to_dict()
    before = values["num_hidden_layers"]
    for name, value in values.items():
        if isinstance(value, list) and len(value) == before:
            values[name] = [value[i % before] for i in range(layers)]
    return type(config).from_dict(values | {"num_hidden_layers": layers} | changes)


def _kept(config: PreTrainedConfig, layers: int, mode: Mode) -> int:
    config = with_layers(config, layers)
    ids = tuple(1 + i % 7 for i in range(_PROBE_TOKENS // 2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        use_packed_attention(model)
        with _Agree():
            fuse_backbone(model)
        set_mode(model, mode, _PROBE_TOKENS)
        batch = GroupedBatch.of([GroupTokens(ids, (ids,))], last_tokens=True)
        live = _Live()
        with live, torch.enable_grad():
            out = hidden_states(model, batch)
            kept = live.bytes
    assert out.grad_fn is not None
    return kept
