"""The discriminator in the checkpoints of a transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gadcore.errors import UserError
from gadcore.models.discriminator import Discriminator

# What Discriminator.save_state() writes into a folder.
STATE = "discriminator-state.safetensors"


class Checkpointed(TrainerCallback):
    """Saves weights and moments with every checkpoint; a resume goes on with them, to the bit.

    resume_from: where they lie at a resume, default the trainer's own folder of that step.
    """

    def __init__(self, discriminator: Discriminator, resume_from: str | Path | None = None) -> None:
        self.discriminator = discriminator
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        folder = self.resume_from or _folder(args, state)
        if not (folder / STATE).exists():
            # A process that is killed between the trainer's files and this one leaves such a checkpoint.
            raise UserError(
                f"{folder} has no {STATE}: go on from a checkpoint that was finished with the discriminator as a "
                "callback, or name the folder that has it with resume_from="
            )
        self.discriminator.load_state(folder)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            self.discriminator.save_state(_folder(args, state))


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
