"""What a run will leave on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.plan.dimensions import Dimensions, read_dimensions
from gadcore.plan.roles import ITEM, Precision, reference_bytes, role_of
from gadcore.train.progress import has_discriminator


class Disk(NamedTuple):
    """Bytes. checkpoint: of one, of what AdamW updates and its moments; checkpoints: how many stay at the end; models:
    student/ and discriminator/ of the run folder, and the reference policy; peak: the most at any time."""

    checkpoint: int
    checkpoints: int
    models: int
    peak: int

    @property
    def left(self) -> int:
        """What the finished run leaves."""
        return self.checkpoint * self.checkpoints + self.models

    def sentence(self) -> str:
        each = f"{self.checkpoint / 1e9:.1f} GB"
        few = {0: "no checkpoint", 1: f"a checkpoint of {each}"}
        kept = few.get(self.checkpoints, f"{self.checkpoints} checkpoints of {each} each")
        return (
            f"disk: this run will leave about {self.left / 1e9:.1f} GB, with {kept} (checkpoint.keep), and takes up to "
            f"{self.peak / 1e9:.1f} GB on the way"
        )


def predict(config: Config, student_path: str, steps: Mapping[str, int]) -> Disk | None:
    """steps: of every stage. None where a model's size is not known."""
    try:
        student = read_dimensions(student_path)
        name = config.discriminator.model
        same = name in ("student", config.student.model)
        discriminator = student if same else read_dimensions(name)
    except UserError:
        return None
    with_discriminator = has_discriminator(steps)
    return disk_of(config, student, discriminator if with_discriminator else None, list(steps.values()))


def disk_of(config: Config, student: Dimensions, discriminator: Dimensions | None, steps: Sequence[int]) -> Disk:
    policy = role_of(student, config.student, "student", student.parameters)
    # Saved at the end: what is trained, or its base with the adapters added, and these beside it.
    models, trained = policy.frozen + policy.trained * policy.item, policy.trained * ITEM[config.student.dtype]
    if not policy.adapted:
        models = trained
    if discriminator is not None:
        scorer = role_of(discriminator, config.discriminator, "discriminator", discriminator.scalar_parameters)
        of_scorer = scorer.trained * ITEM[config.discriminator.dtype]
        models += scorer.frozen + of_scorer
        trained += of_scorer
    checkpoint = 3 * trained
    every = config.checkpoint.every
    # A stage that ends is a checkpoint too.
    ends, total = [sum(steps[: i + 1]) for i in range(len(steps))], sum(steps)
    made = len({*range(every, total + 1, every), *ends}) if every else 0
    kept = min(config.checkpoint.keep, made)
    if discriminator is not None and config.algorithm.kl_coef > 0:
        whole = reference_bytes(student, Precision.of(config.student))
        models += policy.trained * policy.item if policy.adapted else round(whole)
    # The new checkpoint is whole before the oldest goes.
    return Disk(checkpoint, kept, models, checkpoint * min(kept + 1, made) + models)


def check(disk: Disk, folder: Path) -> None:
    """Raises UserError where the disk of the run's folder, which need not exist, has less than the run takes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < disk.peak:
        raise UserError(
            f"{place} has {free / 1e9:.1f} GB free and this run takes up to {disk.peak / 1e9:.1f} GB there: make room, "
            "choose another run.dir, or lower checkpoint.keep or raise checkpoint.every"
        )
