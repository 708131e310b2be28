"""ModelSpec: a model before its weights are loaded, resolved once for whoever plays a role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gadcore.data.template import ChatTemplate
from gadcore.models.generation import read_generation_config
from gadcore.models.loading import load_config, load_tokenizer, resolve_model


@dataclass(frozen=True)
class ModelSpec:
    """name: as it was asked for. path: a directory or a hub id. config: of the model. template: with its tokenizer."""

    name: str
    path: str
    config: PreTrainedConfig
    template: ChatTemplate

    @classmethod
    def resolve(
        cls, name: str, *, system_prompt: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> ModelSpec:
        """The model of that name: a directory, a hub id or a bundled one; its conversations are rendered with
        `system_prompt` and `arguments` (ChatTemplate). Raises UserError where there is none, or where its tokenizer has
        no chat template that gadcore can use."""
        path = resolve_model(name)
        config = load_config(path)
        template = ChatTemplate(
            load_tokenizer(path),
            system_prompt=system_prompt,
            arguments=arguments,
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
        )
        return cls(name, path, config, template)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self.template.tokenizer
        return tokenizer

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the model was made for, None where it does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def notes(self) -> list[str]:
        """What of its files is not taken as it stands there, in sentences."""
        _, changed = read_generation_config(self.path)
        return [*self.template.notes, *([changed] if changed else [])]

    def same_tokens(self, other: ModelSpec) -> bool:
        """Whether both give equal token ids for equal conversations."""
        return self.path == other.path or same_tokenizer(self.template, other.template)


def same_tokenizer(a: ChatTemplate, b: ChatTemplate) -> bool:
    """Whether both give equal token ids for equal conversations."""
    one, other = a.tokenizer, b.tokenizer
    return bool(
        one.chat_template == other.chat_template
        and a.end_id == b.end_id
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )
