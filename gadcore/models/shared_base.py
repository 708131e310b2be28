"""One frozen base for several roles: student, discriminator and reference compute with the same tensors.

A role has modules of its own over the base's parameters. So which adapter a pass runs under is no state: a layer that
is computed again in the backward pass, on whatever thread, computes with its own role's, what one role's modules keep
or skip is no other's, and nothing has to be switched between passes. The modules take a few MiB.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from gadcore.config.adapter import LoRA, lora_of
from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError, foreign
from gadcore.models.adapter import add_adapter, base_parameters, loaded_on, quantise_base
from gadcore.models.backbone import ATTENTION
from gadcore.models.loading import fresh_head, load_causal_lm, load_discriminator, load_on_each, set_padding
from gadcore.models.peft_format import load_adapter, resolved
from gadcore.models.spec import ModelSpec


def beside(module: nn.Module, others: dict[int, Any] | None = None) -> Any:
    """A copy of modules over the same parameters. others: what else stands for something of theirs, by its id."""
    shared: dict[int, Any] = {id(p): p for p in module.parameters()}
    return copy.deepcopy(module, shared | (others or {}))


class SharedBase:
    """A causal language model that nobody changes, loaded once, by every process whole. name: of the directory or hub
    id."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._model, self.name = model.requires_grad_(False), name

    @classmethod
    def load(cls, spec: ModelSpec, settings: StudentSettings, device: torch.device, world: World = ALONE) -> SharedBase:
        def whole() -> PreTrainedModel:
            model = load_causal_lm(spec.path, settings.weights_dtype, loaded_on(settings, device, "student"))
            quantise_base(model, settings, device, "student")
            return model

        return cls(load_on_each(spec.path, world, whole), spec.path)

    def policy(self, settings: StudentSettings, *, seed: int = 0, world: World = ALONE) -> PreTrainedModel:
        """The base with the adapter that the settings ask for, the same on every process."""
        model: PreTrainedModel = beside(self._model)
        with world.agreeing():
            _adapt(model, settings, "student", seed)
        return model

    def scorer(
        self, settings: DiscriminatorSettings, *, seed: int, end_id: int, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """A scalar-headed model over the base: its backbone with an adapter, and a fresh head.

        tokenizer: as of load_discriminator(). UserError where the model's family has no such class.
        """
        config = copy.deepcopy(self._model.config)
        config.num_labels = 1
        # The backbone's as well, to the object: a copy that still attends by "sdpa" would score without a word.
        config._attn_implementation = ATTENTION
        what = f"the model {self.name} cannot be the discriminator's base"
        with foreign(what, "give discriminator.model"), torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config)
        backbone, prefix = self._model.base_model, made.base_model_prefix
        if type(made.base_model) is not type(backbone) or not isinstance(made.score, nn.Linear):
            raise UserError(
                f"the model {self.name} ({config.model_type}) has another backbone as a classifier: set "
                "discriminator.adapter = none"
            )
        device = next(backbone.parameters()).device
        setattr(made, prefix, beside(backbone, {id(backbone.config): made.config}))
        made.score = nn.Linear(
            made.score.in_features, 1, bias=made.score.bias is not None, device=device, dtype=_dtype(settings)
        )
        if made.score.bias is not None:
            nn.init.zeros_(made.score.bias)
        fresh_head(made, seed)
        set_padding(made, tokenizer, end_id)
        scorer: PreTrainedModel = made.eval()
        _adapt(scorer, settings, "discriminator", seed)
        return scorer


def load_scorer(
    spec: ModelSpec,
    settings: DiscriminatorSettings,
    *,
    device: torch.device,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    base: SharedBase | None = None,
    world: World = ALONE,
) -> PreTrainedModel:
    """The discriminator's model: over `base` where there is one, else loaded by itself, with an adapter where the
    settings ask for one. world: of several processes: the model is sharded, or with an adapter whole on each of them.
    Raises UserError as load_discriminator() does."""
    given: dict[str, Any] = {"seed": seed, "end_id": spec.template.end_id, "tokenizer": tokenizer}
    if base is not None:
        with world.agreeing():
            return base.scorer(settings, **given)
    if lora_of(settings) is None:
        return load_discriminator(spec.path, settings.dtype, device=device, world=world, **given)

    def adapted() -> PreTrainedModel:
        place = loaded_on(settings, device, "discriminator")
        model = load_discriminator(spec.path, settings.weights_dtype, device=place, **given)
        quantise_base(model, settings, device, "discriminator")
        model.score.to(_dtype(settings))
        _adapt(model, settings, "discriminator", seed)
        return model

    return load_on_each(spec.path, world, adapted)


def shares_base(student: StudentSettings, discriminator: DiscriminatorSettings, *, same_model: bool) -> bool:
    """Whether student and discriminator compute with one base. same_model: both start from one directory."""
    both = lora_of(student) is not None and lora_of(discriminator) is not None
    kept = [(model.weights_dtype, model.adapter_base) for model in (student, discriminator)]
    return both and same_model and kept[0] == kept[1]


def _adapt(model: PreTrainedModel, settings: StudentSettings | DiscriminatorSettings, owner: str, seed: int) -> None:
    lora: LoRA | None = resolved(lora_of(settings), settings, owner)
    if lora is None:
        raise ValueError(f"{owner}.adapter is none: a model without an adapter shares its weights with nobody")
    add_adapter(model, lora, _dtype(settings), owner=owner, seed=seed)
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)
    if lora.start is not None:
        load_adapter(model, lora.start, owner)
    assert base_parameters(model), "a model with adapters has a base"


def _dtype(settings: StudentSettings | DiscriminatorSettings) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype
