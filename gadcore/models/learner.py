"""What student and discriminator have in common: a backbone made ready for packed groups, and its optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.data.groups import GroupTokens, MicroBatch, packed
from gadcore.models.activations import Mode, set_mode
from gadcore.models.backbone import cost_of, prune_last_layer, use_packed_attention
from gadcore.models.fused import embed_in_place, fuse_backbone
from gadcore.models.host_master import HostMaster
from gadcore.models.loading import save_model
from gadcore.models.optim import Optimizer
from gadcore.models.readout import Readout

R = TypeVar("R", bound=Readout)


class Learner:
    """A model that is trained on packed groups.

    model: the Hugging Face model; its layers attend, norm and multiply by gadcore's functions from here on.
    keeps: what its backward pass keeps (gadcore.models.activations).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: StudentSettings | DiscriminatorSettings,
        *,
        owner: str,
        micro_batch_tokens: int,
        activation_checkpointing: Mode | Literal["auto"],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """owner: what the model is called in errors. micro_batch_tokens: packed tokens of a forward pass at most.
        tokenizer: what save() writes beside the model.
        """
        # First: where the masters are the host's, the model computes with other weights from here on.
        kind = HostMaster if settings.master == "host" else Optimizer
        self.optimizer = kind(model, settings, lr=settings.lr, owner=owner)
        use_packed_attention(model)
        fuse_backbone(model)
        embed_in_place(model)
        prune_last_layer(model)
        self.model, self.owner = model, owner
        self._tokenizer = tokenizer
        self.micro_batch_tokens = micro_batch_tokens
        self.cost = cost_of(model)
        self.keeps = set_mode(model, activation_checkpointing, micro_batch_tokens, settings.autocast)
        self._unread: list[Readout] = []

    def packed(
        self,
        groups: Sequence[GroupTokens],
        *,
        teacher: bool,
        scored: bool | None = None,
        logprobs: Sequence[Sequence[float]] = (),
    ) -> Iterator[MicroBatch]:
        """A batch in micro-batches on the model's device; see gadcore.data.groups.packed()."""
        return packed(
            groups,
            self.micro_batch_tokens,
            self.cost,
            teacher=teacher,
            scored=scored,
            logprobs=logprobs,
            device=self.model.device,
        )

    def later(self, readout: R) -> R:
        """Lets step() read what a pass has found, beside the gradient's norm."""
        self._unread.append(readout)
        return readout

    def step(self, lr: float | None = None) -> float:
        """One optimizer step on the gradient that is there; returns its norm before clipping.

        UserError, with the weights as they were, where the norm is not finite.
        """
        if lr is not None:
            self.optimizer.set_lr(lr)
        readouts, self._unread = self._unread, []
        return self.optimizer.step(readouts)

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face directory: safetensors, config, generation config, tokenizer.

        The weights are those that the optimizer updates, in their dtype.
        UserError where it cannot be written; ValueError for a model that was made without a tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError(f"the {self.owner} was made without a tokenizer to save beside it")
        weights = self.optimizer.weights(dict(self.model.named_parameters()))
        save_model(self.model, self._tokenizer, folder, weights)
