"""GADReward: the discriminator as a reward function of TRL's GRPOTrainer, trained while it is asked.

    reward = GADReward(Discriminator.load("my-model"))
    trainer = GRPOTrainer(.., reward_funcs=[reward], callbacks=[reward])

The teacher's text is a column of the data set. TRL asks for rewards once for every generation, which may be a part of
an optimizer step (steps_per_generation below gradient_accumulation_steps), exactly one, or several of them; and several
passes over it (num_iterations) ask no more. The discriminator's batch is another matter: as many prompts as an
optimizer step of the policy has, whatever TRL brings at once. Every group is scored under the weights that the
discriminator had before the step that it takes part in, and trains it exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gadcore.data.groups import Group
from gadcore.errors import UserError
from gadcore.integrations.trl.checkpoint import Checkpointed
from gadcore.integrations.trl.rows import Prompt, Row, SampleTexts, end_ids_of, groups_of, rows_of
from gadcore.integrations.trl.update import FIGURES, Found, Update, gathered, ranks
from gadcore.models.discriminator import Discriminator

Log = Callable[[str, float], None]


class GADReward(Checkpointed):
    """Reward function and callback in one: give the same object as reward_funcs=[..] and as callbacks=[..].

    discriminator: on the device where it is to compute; on several ranks every one loads the same.
    teacher_column: of the data set, the teacher's text. groups_per_update: prompts of a step of the discriminator,
    default those of an optimizer step of the policy. resume_from: where the discriminator's state lies at a resume,
    default the trainer's checkpoint. frozen: scores without training.

    The trainer's log gets discriminator/loss, accuracy, margin, teacher_score, sample_score and grad_norm. In
    evaluation the discriminator only scores: eval_discriminator/accuracy is that on held-out prompts.
    updates: optimizer steps of the discriminator in this process.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        *,
        teacher_column: str = "teacher_response",
        groups_per_update: int | None = None,
        resume_from: str | Path | None = None,
        frozen: bool = False,
    ) -> None:
        if groups_per_update is not None and groups_per_update < 1:
            raise UserError(f"groups_per_update must be 1 or more, is {groups_per_update}")
        # What TRL calls the reward in its log.
        self.__name__ = "discriminator"
        super().__init__(discriminator, resume_from)
        self.teacher_column = teacher_column
        self.groups_per_update = groups_per_update
        self.frozen = frozen
        self.updates = 0
        self._update = Update(discriminator)
        self._args: Any = None
        self._model: Any = None
        self._texts: SampleTexts | None = None

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Log | None = None,
        **columns: Any,
    ) -> list[float]:
        """D(x, y) of every completion, in their order."""
        if self._texts is None:
            raise UserError(
                "GADReward is a callback as well: give the same object to the trainer as reward_funcs=[reward] and as "
                "callbacks=[reward]"
            )
        rows = rows_of(prompts, completions, completion_ids, columns, self.teacher_column, self._texts)
        log = log_metric or (lambda name, value: None)
        # As TRL itself tells evaluation from training.
        if not self._model.training:
            return self._scored(groups_of(rows), log)
        with torch.enable_grad():
            return self._trained(rows, log)

    def _scored(self, groups: Sequence[Sequence[Row]], log: Log) -> list[float]:
        """Of this rank's rows alone: a group that is split over ranks is scored in parts."""
        scores = self.discriminator.score([self._group(group) for group in groups], backward=False)
        found = Found(scores.rewards, scores.teacher_scores, {name: getattr(scores, name) for name in FIGURES})
        _tell(found, log)
        return [reward for group in scores.rewards for reward in group]

    def _trained(self, rows: list[Row], log: Log) -> list[float]:
        # Ranks may have parts of a group, and all of them take part in a step of the discriminator.
        everyone = gathered(rows)
        rank, _ = ranks()
        groups = groups_of([row for part in everyone for row in part], self._args.num_generations)
        rewards: list[float] = []
        for batch, complete in self._batches(groups):
            found = self._update.add([self._group(group) for group in batch], backward=not self.frozen)
            rewards += [reward for group in found.rewards for reward in group]
            _tell(found, log)
            if complete and not self.frozen:
                log("discriminator/grad_norm", self._step())
        begin = sum(map(len, everyone[:rank]))
        return rewards[begin : begin + len(rows)]

    def _batches(self, groups: list[list[Row]]) -> Iterator[tuple[list[list[Row]], bool]]:
        """(groups, whether a step of the discriminator follows)."""
        wanted, here = self._wanted(), len(groups)
        if here % wanted and wanted % here:
            raise UserError(
                f"TRL brings {here} prompts at once, a step of the discriminator takes {wanted}: set groups_per_update "
                "of GADReward to a divisor or a multiple of the former"
            )
        for begin in range(0, here, wanted):
            batch = groups[begin : begin + wanted]
            yield batch, self._update.groups + len(batch) >= wanted

    def _wanted(self) -> int:
        if self.groups_per_update is not None:
            return self.groups_per_update
        args = self._args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if rows % args.num_generations:
            raise UserError(
                f"an optimizer step has {rows} samples, no whole groups of num_generations = {args.num_generations}: "
                "set groups_per_update of GADReward, or change gradient_accumulation_steps"
            )
        return int(rows // args.num_generations)

    def _group(self, rows: Sequence[Row]) -> Group:
        first = rows[0]
        return self.discriminator.group(
            first.prompt, first.teacher, [row.text for row in rows], [row.finished for row in rows]
        )

    def _step(self) -> float:
        self.updates += 1
        return self._update.step()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(args, "num_generations", None) is None:
            raise UserError(f"GADReward goes with TRL's GRPOTrainer: {type(args).__name__} has no num_generations")
        self._args, self._model = args, kwargs["model"]
        tokenizer = kwargs["processing_class"]
        self._texts = SampleTexts(tokenizer, end_ids_of(self._model, tokenizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch may end in an optimizer step of fewer samples: the discriminator has one then as well."""
        if self._update.groups:
            self._step()


def _tell(found: Found, log: Log) -> None:
    rewards = [reward for group in found.rewards for reward in group]
    for name in FIGURES:
        log(f"discriminator/{name}", found.figures[name])
    log("discriminator/teacher_score", sum(found.teacher_scores) / len(found.teacher_scores))
    log("discriminator/sample_score", sum(rewards) / len(rewards))
