"""What student and discriminator have in common: a backbone made ready for packed groups, and its optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.data.groups import GroupTokens, MicroBatch, packed
from gadcore.distributed import fsdp
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError, cause, foreign
from gadcore.files import sync, temporary
from gadcore.models.activations import Mode, set_mode
from gadcore.models.adapter import is_adapted, own_parameters
from gadcore.models.backbone import cost_of, prune_last_layer, use_packed_attention
from gadcore.models.fused import embed_in_place, fuse_backbone
from gadcore.models.host_master import HostMaster
from gadcore.models.loading import save_model
from gadcore.models.optim import Optimizer
from gadcore.models.peft_format import write_adapter
from gadcore.models.precision import of_products_alone
from gadcore.models.readout import Readout
from gadcore.models.shallow import decoder_layers
from gadcore.models.state import optimizer_tensors, restore_optimizer, restore_parameters
from gadcore.models.streaming import save_sharded

R = TypeVar("R", bound=Readout)
# The folder of an exported model that holds its adapters alone.
ADAPTER = "adapter"


class Learner:
    """A model that is trained on packed groups.

    model: the Hugging Face model; its layers attend, norm and multiply by gadcore's functions from here on.
    keeps: what its backward pass keeps (gadcore.models.activations).
    world: the processes that it is trained by. All of them know every batch as a whole, take their shares of its
        micro-batches, and find the same figures; every method is called by all of them. With adapters each has all of
        the model, else its shards.
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
        optimizer: torch.optim.Optimizer | None = None,
        world: World = ALONE,
    ) -> None:
        """owner: what the model is called in errors. micro_batch_tokens: packed tokens of a forward pass at most.
        tokenizer: what save() writes beside the model. optimizer: over the model's parameters; default AdamW, by the
        settings. world: of several processes, where a model without adapters is sharded here unless it has been.

        Raises UserError for what does not work over several processes.
        """
        if world.size > 1:
            _refuse(settings, owner)
            if not (is_adapted(model) or fsdp.is_sharded(model)):
                fsdp.shard(model, decoder_layers(model), world)
        # First: where the masters are the host's, the model computes with other weights from here on.
        if settings.master == "host":
            if optimizer is not None:
                raise ValueError(f"{owner}.master = host has an optimizer of its own: leave it at device")
            self.optimizer: Optimizer = HostMaster(model, settings, lr=settings.lr, owner=owner)
        else:
            self.optimizer = Optimizer(model, settings, lr=settings.lr, owner=owner, own=optimizer, world=world)
        use_packed_attention(model)
        fuse_backbone(model)
        embed_in_place(model)
        fsdp.inside(model, lambda: prune_last_layer(model))
        if fsdp.is_sharded(model) and settings.autocast != "none":
            # The bits that autocast would make of them, in half of the bytes. After the probe: that has no autocast.
            # A head of one row, a discriminator's, scores in float32.
            products = {p for p in of_products_alone(model) if len(p) > 1}
            fsdp.gather_in(getattr(torch, settings.autocast), model, products)
        self.model, self.owner, self.world = model, owner, world
        self._tokenizer = tokenizer
        self.micro_batch_tokens = micro_batch_tokens
        self.cost = cost_of(model)
        self.keeps = set_mode(model, activation_checkpointing, micro_batch_tokens, settings.autocast, world)
        self._unread: list[Readout] = []

    def packed(
        self,
        groups: Sequence[GroupTokens],
        *,
        teacher: bool,
        scored: bool | None = None,
        logprobs: Sequence[Sequence[float]] = (),
    ) -> Iterator[MicroBatch]:
        """This process's micro-batches of a batch, on the model's device; see gadcore.data.groups.packed()."""
        return packed(
            groups,
            self.micro_batch_tokens,
            self.cost,
            teacher=teacher,
            scored=scored,
            logprobs=logprobs,
            device=self.model.device,
            rank=self.world.rank,
            size=self.world.size,
        )

    def weights(self) -> dict[str, Tensor]:
        """What is updated, and all that a run has to keep of the model's weights, by the names of the parameters."""
        return self.optimizer.weights(own_parameters(self.model))

    def parameter_tensors(self) -> list[Tensor]:
        """All tensors that look at the memory of its own parameters: who moves that memory moves these."""
        return memory_of(self.model)

    def local_parameters(self) -> dict[str, Tensor]:
        """Its own parameters by their names, of sharded ones the rows that are here: plain tensors, no copies."""
        return {name: fsdp.local(p) for name, p in own_parameters(self.model).items()}

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

    def save(self, folder: Path | str) -> None:
        """Writes an ordinary Hugging Face directory: safetensors, config, generation config, tokenizer.

        The weights are those that the optimizer updates, in their dtype. Of a model with adapters they are its base's
        with the adapters added, see save_model(), and the adapters lie beside them as peft's, in the folder ADAPTER.
        Of several processes the first one writes; of shards none has more than one tensor whole at a time.
        UserError where it cannot be written; ValueError for a model that was made without a tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError(f"the {self.owner} was made without a tokenizer to save beside it")
        place = Path(folder)
        if fsdp.is_sharded(self.model):
            save_sharded(self.model, self._tokenizer, place, self.world)
            return
        with self.world.agreeing():
            if self.world.is_first:
                self._save(place, self._tokenizer)

    def _save(self, place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Of a model that this process has whole."""
        weights = self.weights()
        save_model(self.model, tokenizer, place, weights)
        if is_adapted(self.model):
            (place / ADAPTER).mkdir()
            write_adapter(self.model, place / ADAPTER, weights)

    def discard(self) -> None:
        """Drops the gradient that is there, and what was found with it: the next pass begins anew."""
        self._unread = []
        self.optimizer.adamw.zero_grad(set_to_none=True)
        for p in self.optimizer.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All that training changes, flat: "parameters.<name>" what is updated, "optimizer.<name>.<key>" its moments.

        The tensors themselves, no copies: they change with the next step. lr and the other settings are not among them.
        UserError for a sharded model: a run's checkpoints are of shards.
        """
        self._is_whole()
        weights = self.weights()
        moments = optimizer_tensors(self.optimizer.adamw, weights)
        return {f"parameters.{name}": weight.detach() for name, weight in weights.items()} | {
            f"optimizer.{name}": tensor for name, tensor in moments.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets what state_dict() gave, in place and to the bit; a gradient that is there is dropped.

        Raises UserError where it is another model's: other names, shapes or dtypes; and for a sharded model.
        """
        self._is_whole()
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "optimizer": {}}
        for full, tensor in tensors.items():
            part, _, name = full.partition(".")
            if part not in parts:
                raise UserError(f"the state has {full!r}, which no {self.owner} has: give what state_dict() gave")
            parts[part][name] = tensor
        weights = self.weights()
        restore_parameters(weights, parts["parameters"], self.owner)
        restore_optimizer(self.optimizer.adamw, parts["optimizer"], weights)
        self.optimizer.weights_changed()
        self.discard()

    def _is_whole(self) -> None:
        if fsdp.is_sharded(self.model):
            raise UserError(
                f"the {self.owner} is sharded over {self.world.size} processes, none of which has its whole state: "
                "save() writes a model directory, and checkpoints of a run keep shards"
            )

    def save_state(self, folder: Path | str) -> Path:
        """Writes state_dict() to <folder>/<owner>-state.safetensors, whole or not at all; returns the file.

        The folder may be a checkpoint of somebody else's trainer; it is made where it is missing. UserError where the
        file cannot be written. Of several processes that have the model whole the first one writes.
        """
        target = Path(folder) / f"{self.owner}-state.safetensors"
        with self.world.agreeing():
            if self.world.is_first:
                self._write_state(target)
        return target

    def _write_state(self, target: Path) -> None:
        partial = temporary(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, partial)
            sync(partial)
            partial.replace(target)
            sync(target.parent)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {target}: {cause(error)}; free some space, then save again") from error
        finally:
            partial.unlink(missing_ok=True)

    def load_state(self, folder: Path | str) -> None:
        """Reads what save_state() wrote. UserError where it is missing, damaged or another model's."""
        path = Path(folder) / f"{self.owner}-state.safetensors"
        with foreign(f"cannot read {path}", "give a folder that save_state() has written to"):
            tensors = load_file(path)
        self.load_state_dict(tensors)


def memory_of(model: PreTrainedModel) -> list[Tensor]:
    """All tensors that look at the memory of a model's own parameters."""
    return list(own_parameters(model).values()) if is_adapted(model) else fsdp.memory(model)


def _refuse(settings: StudentSettings | DiscriminatorSettings, owner: str) -> None:
    if settings.master == "host":
        raise UserError(
            f"{owner}.master = host keeps whole masters in one process's host memory, and this job has several "
            f"processes: set {owner}.master = device, every process holds its share of them there"
        )
