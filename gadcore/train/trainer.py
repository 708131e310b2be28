"""Trainer: the state of a run, and what the algorithm asks of it besides mathematics.

Sampling, the resumable loop over batches, metrics, checkpoints, the held-out evaluation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from gadcore.checkpoint import store
from gadcore.config.settings import Config
from gadcore.data.batches import Loader
from gadcore.data.groups import Group
from gadcore.data.template import ChatTemplate
from gadcore.errors import Interrupted, UserError
from gadcore.measure.heldout import evaluate
from gadcore.memory.colocation import Colocation
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.loading import save_model
from gadcore.models.student import PolicyStats, SeqKDStats, Student
from gadcore.record.health import Monitor, watched
from gadcore.record.monitor import MachineMonitor
from gadcore.record.run_folder import RunFolder
from gadcore.record.trace import Trace
from gadcore.record.tracking import Tracker, read_rows
from gadcore.record.view import View
from gadcore.rollout import Engine, SampleRequest
from gadcore.train.archive import Archive
from gadcore.train.convergence import measure
from gadcore.train.metrics import sample_traits, step_metrics
from gadcore.train.phases import Phases
from gadcore.train.progress import TIME_FORMAT, Progress, derived_seed, stage_steps


class Trainer:
    """Owns the models, the sampler and the records of one run."""

    def __init__(
        self,
        config: Config,
        stages: Sequence[str],
        folder: RunFolder,
        *,
        student: Student,
        discriminator: Discriminator | None,
        engine: Engine,
        template: ChatTemplate,
        loader: Loader,
        held_out: Sequence[Group],
        phases: Phases,
        memory: Colocation,
        view: View,
        tracker: Tracker,
        stop_requested: Callable[[], str | None],
        facts: dict[str, Any],
        make_discriminator: Callable[[], Discriminator] | None = None,
        machine: MachineMonitor | None = None,
        trace: Trace | None = None,
    ) -> None:
        """make_discriminator: an untrained discriminator for the convergence rule, equal ones on every call."""
        self.config = config
        self.stage_steps = stage_steps(config, stages, loader.steps_per_epoch)
        self.folder = folder
        self.student = student
        self._discriminator = discriminator
        self.engine = engine
        self.template = template
        self.loader = loader
        self.held_out = held_out
        self.phases = phases
        self.memory = memory
        self.view = view
        self.tracker = tracker
        self.stop_requested = stop_requested
        self.facts = facts
        self._make_discriminator = make_discriminator
        self._machine = machine
        self._trace = trace
        self._step_began = 0.0
        self._health = Monitor()
        self._archive = Archive(folder, memory, loader, list(self.stage_steps), student, discriminator)
        self.progress = Progress()

    @property
    def discriminator(self) -> Discriminator:
        if self._discriminator is None:
            raise RuntimeError("this run has no discriminator")
        return self._discriminator

    # The loop

    def steps(self, stage: str) -> Iterator[tuple[int, list[Group]]]:
        """(step within the stage, from 1; its batch), beginning where the run stands."""
        if self.progress.stage != stage:
            self.progress.stage, self.progress.stage_step = stage, 0
        self.view.stage(stage, self._length(stage))
        while self._goes_on(stage):
            self._stop_if_asked()
            self._begin_step()
            yield self.progress.stage_step + 1, next(self.loader)
        if stage == "gad":
            self._take_best()

    def _begin_step(self) -> None:
        """What lies between two steps, checkpoints and evaluations, is part of neither."""
        self._step_began = time.perf_counter()
        if self._machine is not None:
            self._machine.begin_step()

    def _length(self, stage: str) -> int:
        """Steps of the stage as far as is known."""
        return self.stage_steps[stage] + (self.progress.gate.extra if stage == "warmup" else 0)

    def _goes_on(self, stage: str) -> bool:
        progress = self.progress
        if stage == "gad" and progress.convergence.stopped:
            return False
        if stage == "warmup" and progress.stage_step == self._length(stage):
            self._pass_gate()
        if stage == "gad" and self._length(stage) and progress.stage_step == 0 and not progress.convergence.measured:
            self._look_at_convergence()
        return progress.stage_step < self._length(stage)

    def is_done(self, stage: str) -> bool:
        return stage in self.progress.done

    def end_stage(self, stage: str) -> None:
        self.progress.done.append(stage)
        self.progress.lasted[stage] = self.progress.stage_step
        if self.config.checkpoint.every:
            self.save()

    def _stop_if_asked(self) -> None:
        reason = self.stop_requested()
        if reason is None:
            return
        saved = "before the first step"
        if self.progress.step:
            self.save()
            saved = f"after step {self.progress.step}, saved"
        command = "seqkd " if "seqkd" in self.stage_steps else ""
        raise Interrupted(
            f"stopped by {reason} {saved}; go on with: "
            f"{sys.executable} -m gadcore.run {command}--run.dir {self.folder.path} --resume auto"
        )

    # Sampling

    def sample(self, groups: Sequence[Group], stage: str, step: int) -> None:
        """Draws N samples of the current student for every group of the batch."""
        rollout = self.config.rollout
        self.view.status(f"sampling {len(groups) * rollout.group_size} responses")
        self._generate(groups, rollout.group_size, f"{stage}/{step}")

    def _generate(self, groups: Sequence[Group], n: int, purpose: str) -> None:
        requests = [
            SampleRequest(g.prompt.token_ids, n, derived_seed(self.config.run.seed, purpose, g.prompt.index))
            for g in groups
        ]
        with self.phases("synchronise"):
            self.engine.update_weights(self.student.model)
        with self.phases("rollout"):
            responses = self.engine.generate(
                requests,
                temperature=self.config.rollout.temperature,
                max_tokens=self.config.data.max_response_tokens,
            )
        for group, samples in zip(groups, responses, strict=True):
            group.samples = samples

    # Records

    def record(
        self,
        stage: str,
        step: int,
        groups: Sequence[Group],
        stats: PolicyStats | SeqKDStats | None,
        student_norm: float | None,
        scores: Scores | None = None,
        discriminator_norm: float | None = None,
    ) -> None:
        """Ends a step: metrics, a sample triplet now and then, a checkpoint when due."""
        progress = self.progress
        progress.step += 1
        progress.stage_step = step
        every = self.config.checkpoint.every
        # The end of a stage has a checkpoint of its own.
        last = step == self._length(stage)
        due = bool(every) and progress.step % every == 0 and not last
        values = step_metrics(groups, stats, student_norm, scores, discriminator_norm)
        if scores is not None:
            values |= sample_traits(groups, scores)
        if stage == "gad" and (last or step % self.config.convergence.every == 0):
            values |= self._look_at_convergence()
        progress.tokens["sampled"] += int(values.get("tokens/sampled", 0))
        progress.tokens["trained"] += int(values.get("tokens/trained", 0))
        self._log_step(stage, step, values)
        every = self.config.tracking.sample_every
        if scores is not None and every and step % every == 0:
            self._log_triplet(stage, groups[0], scores)
        best = progress.convergence.best
        # The student of the minimum must be there to go back to.
        if due or (best and best[0] == progress.step):
            self.save()

    def _log_step(self, stage: str, step: int, values: dict[str, float]) -> None:
        taken = self.phases.take_step()
        values = values | self.memory.take_step()
        values |= {f"time/{name}": seconds for name, seconds in taken.items()}
        values["time/total"] = sum(taken.values())
        for phase, tokens in (("rollout", "sampled"), ("student", "student"), ("discriminator", "discriminator")):
            if phase in taken and f"tokens/{tokens}" in values:
                values[f"perf/{phase}_tokens_per_s"] = values[f"tokens/{tokens}"] / taken[phase]
        if self._machine is not None:
            values |= self._machine.take_step(values.get("tokens/sampled"))
        if self._trace is not None:
            told = {"step": self.progress.step, "stage_step": step}
            self._trace.span(stage, "steps", self._step_began, time.perf_counter(), **told)
        row = {
            "stage": stage,
            "step": self.progress.step,
            "stage_step": step,
            "stage_steps": self._length(stage),
            **values,
        }
        self.folder.metrics.write(row)
        self.tracker.log(values, self.progress.step)
        self.view.step(row)
        for warning in self._health.look(row):
            self.view.message(f"warning: {warning.title}. {warning.text}")

    def _log_triplet(self, stage: str, group: Group, scores: Scores) -> None:
        best = max(range(len(group.samples)), key=lambda i: scores.rewards[0][i])
        triplet = {
            "stage": stage,
            "step": self.progress.step,
            "prompt": group.prompt.messages[-1]["content"],
            "teacher": group.teacher.text,
            "student": group.samples[best].text,
            "reward": scores.rewards[0][best],
            "teacher_score": scores.teacher_scores[0],
        }
        self.folder.samples.write(triplet)
        self.view.sample(triplet)

    def evaluate(self, name: str) -> None:
        """Held-out evaluation of the student (and of D) as they are now, once per name."""
        if not self.held_out or name in self.progress.evaluations:
            return
        self._stop_if_asked()
        self.view.status(f"evaluating on {len(self.held_out)} held-out prompts")
        with self.phases("evaluation"):
            groups = self._held_out_samples()
            with self.phases("discriminator") if self._discriminator else nullcontext():
                result, rows = evaluate(groups, self._discriminator)
        self.phases.take_step()
        self.folder.write_evaluation(name, rows)
        self.progress.evaluations[name] = result
        self.view.evaluation(name, result)

    def _held_out_samples(self, rows: int | None = None) -> list[Group]:
        """The first held-out prompts with one sample each of the student as it is now."""
        groups = [Group(g.prompt, g.teacher) for g in self.held_out[:rows]]
        # The same seeds every time: differences come from the models alone.
        self._generate(groups, 1, "evaluation")
        return groups

    def _pass_gate(self) -> None:
        """Makes the warmup longer while the gate is closed. UserError, after a checkpoint, where it stays closed."""
        progress, settings = self.progress, self.config.gate
        if not settings.enabled or not self.stage_steps.get("gad"):
            return
        if not progress.gate.measured or progress.gate.measured[-1][0] != progress.step:
            self.view.status("measuring the discriminator at the gate")
            with self.phases("evaluation"):
                groups = self._held_out_samples(settings.rows)
                with self.phases("discriminator"):
                    scores = self.discriminator.score(groups, backward=False)
            self.phases.take_step()
            progress.gate = progress.gate.look(progress.step, scores.accuracy)
        self.view.message(progress.gate.told(settings))
        if progress.gate.fails(settings):
            self.save()
            raise UserError(progress.gate.advice(settings))
        progress.gate = progress.gate.extended(progress.gate.further_steps(settings))

    def _look_at_convergence(self) -> dict[str, float]:
        """One measurement of the convergence rule; a student at its minimum is saved. Figures for metrics.jsonl."""
        progress, settings = self.progress, self.config.convergence
        if not settings.enabled:
            return {}
        if self._make_discriminator is None:
            raise RuntimeError("the convergence rule needs make_discriminator")
        self.view.status("training a fresh discriminator on held-out pairs")
        with self.phases("evaluation"):
            groups = self._held_out_samples(settings.rows)
            # The fresh discriminator gets the device for itself.
            self.memory.enter("rest")
            found = measure(groups, self._make_discriminator, settings, self.config.run.seed)
        progress.convergence = progress.convergence.look(progress.step, found.accuracy, found.interval, settings)
        self.view.message(progress.convergence.told())
        if progress.stage_step == 0:
            self.phases.take_step()
            self.save()
        return {"convergence/accuracy": found.accuracy, "convergence/train_accuracy": found.train_accuracy}

    def _take_best(self) -> None:
        """Goes back to the models of the convergence rule's minimum; the records keep what came after it."""
        best = self.progress.convergence.best
        if best is None or best[0] == self.progress.step:
            return
        self._archive.restore_models(store.load(store.at(self.folder.checkpoints, best[0])))
        self.view.message(f"the final student is that of step {best[0]}, where a fresh discriminator did worst")

    # Saving and going on

    def save(self) -> None:
        """A checkpoint of everything that the rest of the run depends on."""
        self.view.status("saving a checkpoint")
        with self.phases("checkpoint"):
            self.progress.seconds = dict(self.phases.seconds)
            path = self._archive.save(self.progress, self.config.checkpoint.keep)
        self.phases.take_step()
        self.view.message(f"checkpoint {path}")

    def resume(self, saved: store.Checkpoint | None) -> None:
        """Goes on from a checkpoint, or from the beginning where the run had none yet.

        The records after the checkpoint are dropped: they will be made again.
        """
        if saved is not None:
            self.progress = self._archive.restore(saved)
            for phase, seconds in self.progress.seconds.items():
                self.phases.seconds[phase] += seconds
        self.folder.metrics.truncate_after(self.progress.step)
        self.folder.samples.truncate_after(self.progress.step)
        self.folder.keep_config(self.config, self.progress.step)
        if self.folder.metrics.path.exists():
            self._health = watched(read_rows(self.folder.metrics.path))
        where = f"after step {self.progress.step}" if saved else "no checkpoint yet, starting from the beginning"
        self.view.message(f"resumed: {where}")

    def ensure_reference(self) -> None:
        """The reference policy: the student as it was when the GAD stage began.

        It is saved beside the first checkpoint of the stage, once.
        """
        self.memory.enter("student")
        self.student.freeze_reference()
        if self.student.reference is not None:
            if self.progress.stage == "gad" and self.progress.stage_step > 0:
                # The stage began in an earlier process.
                self._archive.restore_reference(self.student.reference)
            self.memory.add("reference.parameters", self.student.reference.parameters, frozen=True)

    def finish(self) -> dict[str, Any]:
        """Exports both models as ordinary Hugging Face directories, and writes and returns the summary."""
        self.view.status("saving the models")
        with self.phases("checkpoint"):
            self.memory.enter("student")
            save_model(self.student.model, self.template.tokenizer, self.folder.path / "student")
            if self._discriminator is not None:
                self.memory.enter("discriminator")
                tokenizer = self._discriminator.template.tokenizer
                save_model(self._discriminator.model, tokenizer, self.folder.path / "discriminator")
        summary = self.summary()
        self.folder.write_summary(summary)
        return summary

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
            "health": [asdict(episode) for episode in self._health.episodes],
        }
