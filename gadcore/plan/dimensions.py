"""What a model's config.json says: counts of parameters, and the widths that memory and time depend on.

No weight is read or made: the model is built on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from gadcore.errors import UserError, foreign
from gadcore.models.backbone import decoder_layers
from gadcore.models.directory import check_sizes
from gadcore.models.loading import BUNDLED, HUB_ID, cache_dir

_KNOWN = Path(__file__).with_name("models")


@dataclass(frozen=True)
class Dimensions:
    """Of a decoder with an output head.

    source: the config.json that was read. query, key: widths of all query heads, and of all key heads.
    parameters: as a language model, tied ones once; scalar_parameters: as a discriminator, its head a scalar one.
    matrices: entries of a layer's matrices; layer: all its parameters. head: entries of the output head.
    root: parameters outside the layers. kept_scale: what the real code keeps over what the formula of
    gadcore.plan.activations says, by mode, where that is known. linears: rows and columns of a layer's linear layers,
    by their last names.
    """

    name: str
    source: str
    hidden: int
    layers: int
    heads: int
    query: int
    key: int
    mlp: int
    vocabulary: int
    tied: bool
    parameters: int
    scalar_parameters: int
    matrices: int
    layer: int
    kept_scale: Mapping[str, float] = field(default_factory=dict)
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def root(self) -> int:
        return self.parameters - self.layers * self.layer

    @property
    def token_flops(self) -> float:
        """FLOPs of the layers' matrices for one token, forward."""
        return 2.0 * self.layers * self.matrices

    @property
    def pair_flops(self) -> float:
        """FLOPs of attention for one (query, key) pair, forward, all layers."""
        return 4.0 * self.layers * self.query

    @property
    def head_flops(self) -> float:
        """FLOPs of the output head for one token, forward."""
        return 2.0 * self.head

    def kv_bytes(self, item: int) -> int:
        """Bytes of one token in a KV cache whose numbers take `item` bytes each."""
        return 2 * self.layers * self.key * item


def find_config(name: str) -> Path:
    """The config.json for a model's name: of a directory, of the hub's cache, or of those that come with gadcore.

    Raises UserError where none is at hand; the hub is not asked.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model directory: it has no config.json")
        return path / "config.json"
    converted = cache_dir() / name / "config.json"
    if name in BUNDLED and converted.is_file():
        return converted
    if HUB_ID.fullmatch(name):
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
    known = _KNOWN / f"{name.replace('/', '--')}.json"
    if known.is_file():
        return known
    raise UserError(
        f"no config.json for the model {name!r}: give a directory that has one, a hub id that was downloaded before, "
        f"or one of {', '.join(sorted(path.stem.replace('--', '/') for path in _KNOWN.glob('*.json')))}"
    )


def read_config(name: str) -> tuple[Path, PreTrainedConfig]:
    """(file, settings) of a model. Raises UserError where it is none that transformers knows."""
    path = find_config(name)
    check_sizes(str(path))
    with foreign(f"cannot read the model settings {path}"):
        return path, AutoConfig.from_pretrained(str(path), trust_remote_code=False)


def read_dimensions(name: str) -> Dimensions:
    """The dimensions of a model by its name. Raises UserError as read_config does, or for a model of another kind."""
    path, config = read_config(name)
    with foreign(f"cannot plan for the model settings {path}"):
        text = config.get_text_config()
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            config.num_labels = 1
            discriminator: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
        layers = decoder_layers(model)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return Dimensions(
            name=name,
            source=str(path),
            hidden=text.hidden_size,
            layers=len(layers),
            heads=text.num_attention_heads,
            query=text.num_attention_heads * head_dim,
            key=key_heads * head_dim,
            mlp=text.intermediate_size,
            vocabulary=text.vocab_size,
            tied=bool(text.tie_word_embeddings),
            parameters=sum(p.numel() for p in model.parameters()),
            scalar_parameters=sum(p.numel() for p in discriminator.parameters()),
            matrices=max(sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in layers),
            layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            linears={
                name.rpartition(".")[2]: (module.out_features, module.in_features)
                for name, module in layers[0].named_modules()
                if isinstance(module, nn.Linear)
            },
        )
