"""The checkpoints of one run: everything that the rest of it depends on, and the reference policy beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gadcore.checkpoint import bases, store
from gadcore.checkpoint.state import RngState, restore_rng, rng_state
from gadcore.checkpoint.store import Checkpoint
from gadcore.checkpoint.together import Together
from gadcore.data.batches import Loader
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.memory.colocation import Colocation
from gadcore.memory.holdings import State
from gadcore.models.adapter import own_parameters
from gadcore.models.discriminator import Discriminator
from gadcore.models.learner import Learner
from gadcore.models.state import copy_into, optimizer_tensors, restore_optimizer, restore_parameters
from gadcore.models.student import Student
from gadcore.record.run_folder import RunFolder
from gadcore.train.agreement import of_first
from gadcore.train.drawing import Drawing
from gadcore.train.progress import Progress, other_stages

# The states in which a model and its optimizer are on the device.
_UPDATE: Mapping[str, State] = {"student": "student_update", "discriminator": "discriminator_update"}


class Checkpoints:
    """Writes and reads the checkpoints of a run. Models may wait off the device while they are written.

    Of several processes each calls the same, in the same order.
    """

    def __init__(
        self,
        folder: RunFolder,
        memory: Colocation,
        loader: Loader,
        stages: Sequence[str],
        student: Student,
        discriminator: Discriminator | None,
        data: Callable[[], Mapping[str, str]],
        world: World = ALONE,
        *,
        asynchronous: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        """stages: of the run, by name; a checkpoint of other stages is another run's. data: gives fingerprints of its
        rows, as gadcore.train.resuming compares them. asynchronous, timeout_s: of several processes, see Together.
        """
        self._data, self._world = data, world
        self._together = None
        if world.size > 1:
            self._together = Together(world, asynchronous=asynchronous, timeout_s=timeout_s)
        self.folder, self._memory, self._loader, self._stages = folder, memory, loader, list(stages)
        self.root = folder.checkpoints
        self._student = student
        self._models: dict[Literal["student", "discriminator"], Student | Discriminator] = {"student": student}
        if discriminator is not None:
            self._models["discriminator"] = discriminator
        self._reference_saved = False
        # What may have samples for the next step.
        self.drawing: Drawing | None = None

    def save(self, progress: Progress, keep: int) -> Path:
        """Writes the checkpoint of progress.step, and keeps the `keep` newest and that of the convergence rule's best.

        The records that it counts on are on the disk before. Raises UserError where the folder cannot be written;
        earlier checkpoints are as they were.
        """
        records, digests = of_first(self._world, self._records)
        self._save_reference(progress.step)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, model in self._models.items():
            weights = model.weights()
            tensors[name] = readable(self._memory, weights)
            moments = optimizer_tensors(model.optimizer.adamw, weights)
            tensors[f"{name}-optimizer"] = readable(self._memory, moments)
        rng = rng_state()
        tensors["rng"] = {f"{_of_rank(self._world)}{name}": tensor for name, tensor in rng.tensors.items()}
        states = self._world.all_gather_objects(rng.state)
        state = {
            "stages": self._stages,
            "progress": asdict(progress),
            "loader": self._loader.state(),
            "data": dict(self._data()) if self._world.is_first else {},
            "records": records,
            "digests": digests,
            "rng": rng.state if self._world.size == 1 else states,
            "bases": self._bases,
        }
        drawn = None if self.drawing is None else self.drawing.saved()
        if drawn is not None:
            tensors["ahead"], state["ahead"] = drawn
        best = progress.convergence.best
        return self._save(self.root, progress.step, tensors, state, keep, pinned=best[0] if best else None)

    def _records(self) -> tuple[dict[str, int], dict[str, str]]:
        """(how many rows the checkpoint counts on, digests of these), when they are on the disk."""
        self.folder.sync()
        counts = self.folder.counts()
        return counts, self.folder.digests(counts)

    def _save(self, root: Path, *arguments: Any, **others: Any) -> Path:
        save = store.save if self._together is None else self._together.save
        return save(root, *arguments, **others)

    @property
    def is_asynchronous(self) -> bool:
        """Whether save() returns before the checkpoint is whole."""
        return self._together is not None and self._together.is_asynchronous

    def finish(self) -> None:
        """Returns when what save() has begun is whole: before anything that it writes may change."""
        if self._together is not None:
            self._together.finish()

    def close(self) -> None:
        if self._together is not None:
            self._together.close()

    def restore(self, saved: Checkpoint) -> Progress:
        """Models, loader and random generators as they were; returns where the run stood.

        Raises UserError where the checkpoint is of other stages or models.
        """
        if saved.state["stages"] != self._stages:
            raise UserError(other_stages(self.folder.path, saved.state["stages"], self._stages))
        bases.check(saved.state.get("bases"), self._bases, {n: _called(m) for n, m in self._models.items()})
        self._loader.restore(saved.state["loader"])
        self.restore_models(saved)
        if self.drawing is not None and "ahead" in saved.state:
            self.drawing.restore(saved.tensors["ahead"], saved.state["ahead"])
        restore_rng(self._rng(saved))
        return Progress.of(saved.state["progress"])

    @cached_property
    def _bases(self) -> dict[str, Any]:
        """They do not change: read once, where they are."""
        self._memory.enter("rest")
        here = bases.describe({name: model.model for name, model in self._models.items()})
        bases.check_equal(self._world.all_gather_objects(here))
        return here

    def _rng(self, saved: Checkpoint) -> RngState:
        """This process's random states; of as many processes as there were others the first one's."""
        states, tensors = saved.state["rng"], saved.tensors["rng"]
        if isinstance(states, dict):
            return RngState(states, dict(tensors))
        rank = self._world.rank if saved.ranks == self._world.size else 0
        mine = f"rank-{rank}."
        return RngState(states[rank], {n.removeprefix(mine): tensors[n] for n in tensors if n.startswith(mine)})

    def restore_models(self, saved: Checkpoint) -> None:
        """The parameters and optimizers alone."""
        self.finish()
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
        saved = store.load(path, self._world).tensors["reference"]
        copy_into(dict(own_parameters(reference)), saved)
        self._reference_saved = True

    def _save_reference(self, step: int) -> None:
        """Once: it never changes."""
        reference = self._student.reference
        if reference is not None and not self._reference_saved:
            tensors = readable(self._memory, dict(own_parameters(reference)))
            self._save(self.folder.reference, step, {"reference": tensors}, {}, keep=1)
            self._reference_saved = True


def readable(memory: Colocation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of tensors of any holdings, wherever they wait; of a DTensor what this process holds, as a DTensor."""
    held = {name: t._local_tensor if isinstance(t, DTensor) else t for name, t in tensors.items()}
    values = memory.readable(held)
    return {
        name: DTensor(values[name], t._spec, requires_grad=False) if isinstance(t, DTensor) else values[name]  # type: ignore[call-arg]
        for name, t in tensors.items()
    }


def _of_rank(world: World) -> str:
    return f"rank-{world.rank}." if world.size > 1 else ""


def _called(model: Learner) -> str:
    return str(model.model.config.name_or_path)
