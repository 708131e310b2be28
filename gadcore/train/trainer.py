"""Trainer: the loop over batches of a run, where it stands, and how it is saved and goes on."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gadcore.checkpoint import store
from gadcore.config.functions import load_named
from gadcore.config.settings import Config, MemorySettings
from gadcore.data.batches import Loader
from gadcore.data.groups import Group
from gadcore.distributed.world import ALONE, World
from gadcore.errors import Interrupted, UserError
from gadcore.files import whole_folder
from gadcore.memory.colocation import Colocation
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.learner import Learner
from gadcore.models.score_shaping import shaped
from gadcore.models.student import Student
from gadcore.record.run_folder import RunFolder
from gadcore.rollout.sampler import Sampler
from gadcore.train.agreement import of_first
from gadcore.train.ahead import drawing_of
from gadcore.train.checkpoints import Checkpoints
from gadcore.train.heldout import Heldout
from gadcore.train.metrics import sample_traits, step_costs, step_metrics
from gadcore.train.phases import Phases
from gadcore.train.progress import TIME_FORMAT, Progress, command_of, stage_steps
from gadcore.train.records import Records
from gadcore.train.resuming import go_back
from gadcore.train.reward import Reward, rewards_by
from gadcore.train.snapshot import Snapshot
from gadcore.train.step import StepResult


class Trainer:
    """Owns the models, the sampler, and where the run stands; gadcore.algorithm's stages train by it."""

    def __init__(
        self,
        config: Config,
        stages: Sequence[str],
        *,
        student: Student,
        discriminator: Discriminator | None,
        sampler: Sampler,
        loader: Loader,
        held_out: Sequence[Group] = (),
        records: Records | None = None,
        folder: RunFolder | None = None,
        phases: Phases | None = None,
        memory: Colocation | None = None,
        stop_requested: Callable[[], str | None] = lambda: None,
        make_discriminator: Callable[[], Discriminator] | None = None,
        facts: dict[str, Any] | None = None,
        data: Callable[[], dict[str, str]] = dict,
        world: World = ALONE,
    ) -> None:
        """held_out: groups without samples. records: default none are kept. folder: of checkpoints and results; without
        one nothing can be saved. memory: default a device on which everything stays. stop_requested: why the run is to
        stop after this step, None to go on. make_discriminator: see Heldout. facts: for the summary. data: see
        Checkpoints. world: every process of it has a Trainer of the same run; the first one's records are the run's.
        """
        self.config, self.world = config, world
        self.stage_steps = stage_steps(config, stages, loader.steps_per_epoch)
        self.folder, self.records = folder, records or Records()
        self.student, self._discriminator = student, discriminator
        self.sampler, self.loader = sampler, loader
        self.phases = phases or Phases()
        self.phases.on_begin = self.records.phase
        self.memory = memory or Colocation(
            student.model.device, MemorySettings(offload="none"), Path(), sampler.engine, shared=sampler.engine.shared
        )
        each = config.data.eval_samples
        self.heldout = Heldout(
            held_out, sampler, discriminator, self.phases, self.memory, make_discriminator, samples=each
        )
        self.stop_requested, self.facts = stop_requested, facts or {}
        reward = config.algorithm.reward
        self._reward: Reward | None = None if reward is None else load_named(reward, "algorithm.reward")
        self.progress = Progress()
        self._snapshot = Snapshot(folder, loader.groups, sampler, student, self.phases, config.algorithm)
        self._drawing = drawing_of(config, sampler, loader, student.template, self.records.message)
        self._checkpoints = None
        if folder is not None:
            self._checkpoints = Checkpoints(
                folder,
                self.memory,
                loader,
                list(self.stage_steps),
                student,
                discriminator,
                data,
                world,
                asynchronous=config.checkpoint.asynchronous,
                timeout_s=config.distributed.timeout_s,
            )
            self._checkpoints.drawing = self._drawing
            self.phases.before_update = self._checkpoints.finish

    @property
    def discriminator(self) -> Discriminator:
        if self._discriminator is None:
            raise RuntimeError("this run has no discriminator")
        return self._discriminator

    @property
    def checkpoints(self) -> Checkpoints:
        if self._checkpoints is None:
            raise RuntimeError("this run has no folder to save into")
        return self._checkpoints

    # The loop

    def begin(self, stage: str) -> None:
        """A stage begins, or goes on where the run stands."""
        if self.progress.stage != stage:
            self.progress.stage, self.progress.stage_step = stage, 0
        self.records.stage(stage, self._length(stage))

    def steps(self, stage: str) -> Iterator[tuple[int, list[Group]]]:
        """(step within the stage, from 1; its batch), beginning where the run stands."""
        while self.progress.stage_step < self._length(stage):
            if stage == "gad" and self.progress.convergence.stopped:
                return
            self._stop_if_asked()
            self.records.begin_step()
            yield self.progress.stage_step + 1, next(self.loader)

    def _length(self, stage: str) -> int:
        """Steps of the stage as far as is known."""
        steps = self.progress.curriculum.ends.get(stage, self.stage_steps[stage])
        return steps + (self.progress.gate.extra if stage == "warmup" else 0)

    def is_done(self, stage: str) -> bool:
        return stage in self.progress.done

    def end_stage(self, stage: str) -> None:
        self._drawing.drop()
        self.progress.done.append(stage)
        self.progress.lasted[stage] = self.progress.stage_step
        if self.config.checkpoint.every:
            self.save()

    def _stop_if_asked(self) -> None:
        reason = self.stop_requested()
        if reason is None:
            return
        saved, where = "before the first step", ""
        if self.folder is not None:
            where = f"--run.dir {shlex.quote(str(self.folder.path))} "
            if self.progress.step:
                self.save()
                self.checkpoints.finish()
                saved = f"after step {self.progress.step}, saved"
        command = f"{command_of(self.stage_steps)} ".replace("train ", "")
        start = f"{shlex.quote(sys.executable)} -m gadcore.run"
        if self.world.size > 1:
            start = "the torchrun command that started it, and -m gadcore.run"
        raise Interrupted(f"stopped by {reason} {saved}; go on with: {start} {command}{where}--resume auto")

    def where(self) -> tuple[str, int]:
        """(the phase that is at work, the step), from any thread: what is told of a process that hangs."""
        return self.phases.current or self.progress.stage or "setup", self.progress.step + 1

    def sample(self, groups: Sequence[Group], stage: str, step: int) -> None:
        """Draws N samples of the current student for every group of the batch, as rollout.* says when."""
        self.records.status(f"sampling {len(groups) * self.config.rollout.group_size} responses")
        self._drawing.draw(groups, stage, step, last=step == self._length(stage))

    def sampled(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """The batch in parts, each as it has its samples; mostly it is one, which has them already."""
        return self._drawing.parts(groups)

    def rewards(self, groups: Sequence[Group], scores: Scores) -> list[list[float]] | None:
        """What algorithm.score_clip, .length_debias and .reward make of D's scores; None: they are the rewards."""
        name, found = self.config.algorithm.reward, shaped(groups, scores, self.config.algorithm)
        if self._reward is None or name is None:
            return found
        reward = self._reward
        with self.phases("rewards"):
            # A function of one's own need not give the same twice.
            return of_first(self.world, lambda: rewards_by(reward, name, groups, scores, found))

    def take_snapshot(self) -> Snapshot:
        """What the stage soda learns from, as far as it is not on the disk. Its seconds are those of the first step."""
        if self._length("soda"):
            begun, sampled = self.progress.stage_step > 0, self.progress.tokens
            sampled["sampled"] += self._snapshot.take(begun=begun, say=self.records.status, pause=self._stop_if_asked)
        return self._snapshot

    # What a step leaves

    def record(self, result: StepResult) -> None:
        """Ends a step: metrics, a sample triplet now and then, a checkpoint when due."""
        progress, stage, step = self.progress, result.stage, result.step
        progress.step += 1
        progress.stage_step = step
        values = step_metrics(result) | sample_traits(result)
        last = step == self._length(stage)
        if result.scores is not None:
            values |= self._drawing.figures()
        if stage == "gad" and (last or step % self.config.convergence.every == 0):
            values |= self._measure_convergence()
        progress.tokens["sampled"] += int(values.get("tokens/sampled", 0))
        progress.tokens["trained"] += int(values.get("tokens/trained", 0))
        place = {"stage": stage, "step": progress.step, "stage_step": step, "stage_steps": self._length(stage)}
        costs = step_costs(values, self.phases.take_step(), self.memory.take_step(), meanwhile=self._drawing.meanwhile)
        values |= self._look(result)
        self.records.step(place, values | costs)
        every = self.config.tracking.sample_every
        if result.scores is not None and every and step % every == 0:
            self.records.sample(result.triplet(progress.step))
        best = progress.convergence.best
        # The end of a stage has a checkpoint of its own; the student of the minimum must be there to go back to.
        every = self.config.checkpoint.every
        due = bool(every) and progress.step % every == 0 and step != self._length(stage)
        if due or (best and best[0] == progress.step):
            self.save()

    # Held-out prompts

    def evaluate(self, name: str) -> None:
        """Held-out evaluation of the student (and of D) as they are now, once per name."""
        if not self.heldout.groups or name in self.progress.evaluations:
            return
        self._stop_if_asked()
        self.records.status(f"evaluating on {len(self.heldout.groups)} held-out prompts")
        # A head that no step has trained tells nothing, and costs as much as one that does.
        blank = self.config.discriminator.model == "student" and self.progress.stage in ("", "sft")
        moved = name != "after_warmup" or self.config.algorithm.student_warmup
        result, rows = self.heldout.evaluate(scored=not blank, moved=moved)
        self.progress.evaluations[name] = result
        self.records.evaluation(name, result, rows)

    def _look(self, result: StepResult) -> dict[str, float]:
        """A look of the curriculum at held-out prompts, where one is due; it may end the stage. For metrics.jsonl."""
        progress, settings = self.progress, self.config.curriculum
        progress.curriculum = progress.curriculum.after(None if result.scores is None else result.scores.accuracy)
        if not settings.every or result.step % settings.every or not self.heldout.groups:
            return {}
        self.records.status("looking at held-out prompts")
        if result.scores is None:
            value = self.heldout.cross_entropy(self.student, settings.rows)
        else:
            value = self.heldout.accuracy(settings.rows)
        value = self.world.broadcast_object(value)
        progress.curriculum = progress.curriculum.look(result.stage, progress.step, result.step, value, settings)
        self.records.message(progress.curriculum.message())
        return progress.curriculum.looks[-1].metrics

    def gate_opens(self) -> bool:
        """Whether the GAD stage may begin; where not, the warmup has become longer.

        UserError, after a checkpoint, where the gate stays closed and the run is to end there.
        """
        progress, settings = self.progress, self.config.gate
        if not settings.enabled or not self.stage_steps.get("gad"):
            return True
        if not progress.gate.measured or progress.gate.measured[-1][0] != progress.step:
            self.records.status("measuring the discriminator at the gate")
            accuracy = self.world.broadcast_object(self.heldout.accuracy(settings.rows))
            progress.gate = progress.gate.look(progress.step, accuracy)
        self.records.message(progress.gate.message(settings))
        if progress.gate.fails(settings):
            self.save()
            raise UserError(progress.gate.advice(settings))
        further = progress.gate.further_steps(settings)
        progress.gate = progress.gate.extended(further)
        return further == 0

    def measure_before_gad(self) -> None:
        """The convergence rule's first measurement, of the student with which the GAD stage begins."""
        progress = self.progress
        if self._length("gad") and progress.stage_step == 0 and not progress.convergence.measured:
            self._measure_convergence()

    def _measure_convergence(self) -> dict[str, float]:
        """One measurement of the convergence rule. Figures for metrics.jsonl."""
        progress, settings = self.progress, self.config.convergence
        if not settings.enabled:
            return {}
        self.records.status("training a fresh discriminator on held-out pairs")
        found = self.world.broadcast_object(self.heldout.fresh(settings, self.config.run.seed))
        progress.convergence = progress.convergence.look(progress.step, found.accuracy, found.interval, settings)
        self.records.message(progress.convergence.message())
        if progress.stage_step == 0:
            self.phases.take_step()
            self.save()
        return {"convergence/accuracy": found.accuracy, "convergence/train_accuracy": found.train_accuracy}

    def restore_best(self) -> None:
        """Goes back to the models of the convergence rule's minimum; the records keep what came after it."""
        best = self.progress.convergence.best
        if best is None or best[0] == self.progress.step:
            return
        self.checkpoints.finish()
        self.checkpoints.restore_models(store.load(store.at(self.checkpoints.root, best[0]), self.world))
        self.records.message(f"the final student is that of step {best[0]}, where a fresh discriminator did worst")

    # Saving and going on

    def save(self) -> None:
        """A checkpoint of everything that the rest of the run depends on."""
        self.records.status("saving a checkpoint")
        with self.phases("checkpoint"):
            self.progress.seconds = dict(self.phases.seconds)
            path = self.checkpoints.save(self.progress, self.config.checkpoint.keep)
        self.phases.take_step()
        written = " is being written" if self.checkpoints.is_asynchronous else ""
        self.records.message(f"checkpoint {path}{written}")

    def resume(self, saved: store.Checkpoint | None) -> None:
        """Goes on from a checkpoint, or from the beginning where the run had none yet."""
        if saved is not None:
            self.progress = self.checkpoints.restore(saved)
            if self.config.run.resume != "auto":
                for message in go_back(self.world, self.checkpoints.folder, self.progress):
                    self.records.message(message)
            for phase, seconds in self.progress.seconds.items():
                self.phases.seconds[phase] += seconds
        self.records.go_on_after(self.progress.step, self.config)
        for stage, lasted in self.progress.lasted.items():
            ended = self.progress.convergence.stopped or stage in self.progress.curriculum.ends
            if lasted < self.stage_steps.get(stage, 0) and not ended:
                self.records.message(
                    f"stage {stage} has ended after {lasted} steps, and no setting makes it longer: go back to a "
                    "checkpoint before its end, or start a new run from its student"
                )
        where = f"after step {self.progress.step}" if saved else "no checkpoint yet, starting from the beginning"
        self.records.message(f"resumed: {where}")

    def ensure_reference(self) -> None:
        """The reference policy: the student as it was when the GAD stage began.

        It is saved beside the first checkpoint of the stage, once.
        """
        # The reference alone: it is made of the student's values wherever they wait.
        self.memory.enter("rest")
        self.student.freeze_reference(self.memory.readable(self.student.local_parameters()))
        if self.student.reference is not None:
            if self.progress.stage == "gad" and self.progress.stage_step > 0:
                # The stage began in an earlier process.
                self.checkpoints.restore_reference(self.student.reference)
            self.memory.add("reference.parameters", self.student.reference_tensors, frozen=True)

    def finish(self) -> dict[str, Any]:
        """Exports both models as ordinary Hugging Face directories; writes and returns the summary."""
        self.records.status("saving the models")
        folder = self.checkpoints.folder.path
        with self.phases("checkpoint"):
            self.checkpoints.finish()
            self.memory.enter("student")
            self._export(self.student, folder / "student")
            if self._discriminator is not None:
                self.memory.enter("discriminator")
                self._export(self._discriminator, folder / "discriminator")
        summary = self.summary()
        self.records.summary(summary)
        return summary

    def _export(self, model: Learner, place: Path) -> None:
        """A model's directory, which the first process writes."""
        with whole_folder(place, replace=True) if self.world.is_first else nullcontext(place) as folder:
            model.save(folder)

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        seconds = self.phases.seconds
        return {
            "run": self.config.run.name,
            "started": self.progress.started,
            "finished": time.strftime(TIME_FORMAT),
            "stages": list(self.stage_steps),
            "seconds": {**seconds, "total": sum(seconds.values())},
            "steps": {**self.stage_steps, **self.progress.lasted},
            "tokens": self.progress.tokens,
            **self.facts,
            "memory": self.memory.summary(),
            "evaluations": self.progress.evaluations,
            "gate": asdict(self.progress.gate) if self.progress.gate.measured else None,
            "convergence": self.progress.convergence.summary(),
            "curriculum": asdict(self.progress.curriculum) if self.progress.curriculum.looks else None,
            "health": [asdict(episode) for episode in self.records.episodes],
        }
