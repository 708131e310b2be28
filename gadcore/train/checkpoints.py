"""The checkpoints of one run: everything that the rest of it depends on, and the reference policy beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.checkpoint import bases, store
from gadcore.checkpoint.state import (
    RngState,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
    restore_rng,
    rng_state,
)
from gadcore.checkpoint.store import Checkpoint
from gadcore.data.batches import Loader
from gadcore.errors import UserError
from gadcore.memory.colocation import Colocation
from gadcore.memory.holdings import State
from gadcore.models.adapter import own_parameters
from gadcore.models.discriminator import Discriminator
from gadcore.models.learner import Learner
from gadcore.models.student import Student
from gadcore.record.run_folder import RunFolder
from gadcore.train.progress import Progress, other_stages

# The states in which a model and its optimizer are on the device.
_UPDATE: Mapping[str, State] = {"student": "student_update", "discriminator": "discriminator_update"}


class Checkpoints:
    """Writes and reads the checkpoints of a run. Models may wait off the device while they are written."""

    def __init__(
        self,
        folder: RunFolder,
        memory: Colocation,
        loader: Loader,
        stages: Sequence[str],
        student: Student,
        discriminator: Discriminator | None,
        data: Callable[[], Mapping[str, str]],
    ) -> None:
        """stages: of the run, by name; a checkpoint of other stages is another run's. data: gives fingerprints of its
        rows, as gadcore.train.resuming compares them.
        """
        self._data = data
        self.folder, self._memory, self._loader, self._stages = folder, memory, loader, list(stages)
        self.root = folder.checkpoints
        self._student = student
        self._models: dict[Literal["student", "discriminator"], Student | Discriminator] = {"student": student}
        if discriminator is not None:
            self._models["discriminator"] = discriminator
        self._reference_saved = False

    def save(self, progress: Progress, keep: int) -> Path:
        """Writes the checkpoint of progress.step, and keeps the `keep` newest and that of the convergence rule's best.

        The records that it counts on are on the disk before. Raises UserError where the folder cannot be written;
        earlier checkpoints are as they were.
        """
        self.folder.sync()
        self._save_reference(progress.step)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, model in self._models.items():
            weights = model.weights()
            tensors[name] = self._memory.readable(weights)
            moments = optimizer_tensors(model.optimizer.adamw, weights)
            tensors[f"{name}-optimizer"] = self._memory.readable(moments)
        rng = rng_state()
        tensors["rng"] = rng.tensors
        state = {
            "stages": self._stages,
            "progress": asdict(progress),
            "loader": self._loader.state(),
            "data": dict(self._data()),
            "records": self.folder.counts(),
            "rng": rng.state,
            "bases": self._bases,
        }
        best = progress.convergence.best
        return store.save(self.root, progress.step, tensors, state, keep, pinned=best[0] if best else None)

    def restore(self, saved: Checkpoint) -> Progress:
        """Models, loader and random generators as they were; returns where the run stood.

        Raises UserError where the checkpoint is of other stages or models.
        """
        if saved.state["stages"] != self._stages:
            raise UserError(other_stages(self.folder.path, saved.state["stages"], self._stages))
        bases.check(saved.state.get("bases"), self._bases, {n: _called(m) for n, m in self._models.items()})
        self._loader.restore(saved.state["loader"])
        self.restore_models(saved)
        restore_rng(RngState(saved.state["rng"], saved.tensors["rng"]))
        return Progress.of(saved.state["progress"])

    @cached_property
    def _bases(self) -> dict[str, Any]:
        """They do not change: read once."""
        return bases.describe({name: model.model for name, model in self._models.items()})

    def restore_models(self, saved: Checkpoint) -> None:
        """The parameters and optimizers alone."""
        for name, model in self._models.items():
            self._memory.enter(_UPDATE[name])
            weights = model.weights()
            restore_parameters(weights, saved.tensors[name], name)
            model.optimizer.weights_changed()
            moments = saved.tensors[f"{name}-optimizer"]
            restore_optimizer(model.optimizer.adamw, moments, weights)

    def restore_reference(self, reference: PreTrainedModel) -> None:
        """Gives the reference policy the weights that were saved for it. UserError where they are missing."""
        path = store.latest(self.folder.reference)
        if path is None:
            raise UserError(
                f"the reference policy is missing from {self.folder.reference}: resume from a checkpoint "
                "of the warmup, or start a new run"
            )
        saved = store.load(path).tensors["reference"]
        with torch.no_grad():
            for name, p in own_parameters(reference).items():
                p.copy_(saved[name])
        self._reference_saved = True

    def _save_reference(self, step: int) -> None:
        """Once: it never changes."""
        reference = self._student.reference
        if reference is not None and not self._reference_saved:
            tensors = self._memory.readable(dict(own_parameters(reference)))
            store.save(self.folder.reference, step, {"reference": tensors}, {}, keep=1)
            self._reference_saved = True


def _called(model: Learner) -> str:
    return str(model.model.config.name_or_path)
