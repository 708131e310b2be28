"""The arms of the tiny language, and their measures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from bench.paper import toy
from bench.paper.language import LETTERS, LONGEST, WORDS, Language, generic, policy, scorer
from bench.paper.language_engine import LanguageEngine
from gadcore.config.settings import Config, FreshSettings
from gadcore.data.groups import Group, GroupedBatch, GroupTokens, Prompt, Response
from gadcore.measure.fresh import fresh_discriminator
from gadcore.measure.likeness import ngram_f1
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student
from gadcore.rollout.engine import SampleRequest

DATA, TESTED, WATCHED = 2000, 1000, 200
SEEN, UNSEEN = LETTERS[:6], LETTERS[6:]  # x1 in the training prompts, and in those out of domain
SETTINGS: dict[str, dict[str, Any]] = {
    "student": dict(lr=2e-4, warmup_lr=3e-3, seqkd_lr=3e-3, betas=(0.9, 0.98), grad_clip=1.0),
    "discriminator": dict(lr=3e-3, betas=(0.9, 0.95), grad_clip=1.0),
    "rollout": dict(engine="hf", group_size=8, temperature=1.0),
    "data": dict(max_prompt_tokens=8, max_response_tokens=LONGEST),
    "algorithm": dict(kl_coef=0.0),
    "schedule": dict(batch_size=16, warmup_steps=300, gad_steps=500, seqkd_steps=300),
}
BEFORE_STEPS = 300
EVERY = 25
FRESH_EVERY = 100
FRESH = FreshSettings(steps=100, batch_size=32)
# A healthy and a hacked run, followed by fresh discriminators.
WITH_FRESH = ("gad", "frozen")
# Changes of algorithm.* by arm. "before", "seqkd" and "oracle" are no settings.
ABLATIONS: dict[str, dict[str, Any]] = {
    "gad": {},
    "frozen": {"freeze_discriminator": True},
    "no_student_warmup": {"student_warmup": False},
    "no_discriminator_warmup": {"discriminator_warmup": False},
}
ARMS = ("before", "seqkd", "gad", "oracle", "frozen", "no_student_warmup", "no_discriminator_warmup")


class Experiment:
    """A seed of a language: data, and the student as it was before."""

    def __init__(self, language: Language, seed: int, *, shorter: int = 1) -> None:
        self.language, self.seed, self.shorter = language, seed, shorter
        self.template = toy.WordTemplate(WORDS)
        self.train = language.groups(self.template, DATA, 1 + 7919 * seed, first=SEEN)
        self.watched = language.groups(self.template, WATCHED // shorter, 12345, first=SEEN)
        self.test = language.groups(self.template, TESTED // shorter, 12346, first=SEEN)
        self.elsewhere = language.groups(self.template, TESTED // shorter, 12347, first=UNSEEN)
        self.config = self.configured({})
        self._warm: dict[tuple[bool, bool], tuple[Any, float]] = {}
        self.before = policy(self.template, seed)
        student = self.student(self.config, self.before)
        rows = generic(self.template, 4000, 999 + seed)
        self._stage("seqkd", student, None, self.configured({}, seqkd_steps=BEFORE_STEPS), rows=rows)

    def configured(self, algorithm: dict[str, Any], **schedule: int) -> Config:
        values = copy.deepcopy(SETTINGS)
        values["schedule"] |= schedule
        for name in ("warmup_steps", "gad_steps", "seqkd_steps"):
            values["schedule"][name] = max(1, values["schedule"][name] // self.shorter)
        return toy.settings({**values, "run": {"seed": self.seed}, "algorithm": {**values["algorithm"], **algorithm}})

    def every(self, steps: int) -> int:
        return max(1, steps // self.shorter)

    def student(self, config: Config, model: Any) -> Student:
        return Student(
            model,
            config.student,
            config.algorithm,
            temperature=1.0,
            micro_batch_tokens=10**6,
            activation_checkpointing="off",
        )

    def discriminator(self, config: Config, seed: int | None = None) -> Discriminator:
        return Discriminator(
            scorer(self.template, self.seed if seed is None else seed),
            self.template,
            config.discriminator,
            same_vocabulary=True,
            micro_batch_tokens=10**6,
            activation_checkpointing="off",
        )

    def _stage(
        self,
        stage: str,
        student: Student,
        scorer: Any,
        config: Config,
        look: Callable[[dict[str, Any]], None] = lambda row: None,
        rows: Sequence[Group] | None = None,
    ) -> None:
        toy.run(config, stage, student, scorer, rows or self.train, self.template, look, LanguageEngine)

    def run(self, arm: str) -> dict[str, Any]:
        """A row: measures, curve, CPU seconds (those of a warmup that arms share are in each of them)."""
        start = time.process_time()
        config, shared = self.configured(ABLATIONS.get(arm, {})), 0.0
        student = self.student(config, copy.deepcopy(self.before))
        follow = arm in WITH_FRESH and self.language.name == "styles"
        curve: list[dict[str, Any]] = []
        followed: list[dict[str, Any]] = []

        def watch(row: dict[str, Any]) -> None:
            if row["stage_step"] % self.every(EVERY) == 0:
                found = self.measure(student, self.watched)
                curve.append({"stage": row["stage"], "step": row["stage_step"]})
                curve[-1] |= {k: found[k] for k in ("valid", "reverse_kl", "length")}
                curve[-1] |= {k: row[k] for k in ("discriminator/accuracy", "reward/mean", "reward/std") if k in row}
                if follow and row["stage"] == "gad" and row["stage_step"] % self.every(FRESH_EVERY) == 0:
                    followed.append({"step": row["stage_step"], "valid": found["valid"], **self.fresh(student)})

        if arm == "seqkd":
            self._stage("seqkd", student, None, config, watch)
        elif arm != "before":
            student, discriminator, shared = self._warmed_up(config, student, curve, watch)
            if follow:
                valid = self.measure(student, self.watched)["valid"]
                followed.append({"step": 0, "valid": valid, **self.fresh(student)})
            scorer: Any = self.oracle(config, student) if arm == "oracle" else discriminator
            self._stage("gad", student, scorer, config, watch)
        return {
            "experiment": "language",
            "language": self.language.name,
            "arm": arm,
            "seed": self.seed,
            "student_lr": config.student.lr,
            "seconds": time.process_time() - start + shared,
            "in_domain": self.measure(student, self.test),
            "out_of_domain": self.measure(student, self.elsewhere),
            "curve": curve,
            "fresh": followed,
        }

    def _warmed_up(
        self, config: Config, student: Student, curve: list[dict[str, Any]], watch: Callable[[dict[str, Any]], None]
    ) -> tuple[Student, Discriminator, float]:
        """Both models after the warmup, and the CPU seconds of one that was kept: equal settings share a warmup."""
        key = config.algorithm.student_warmup, config.algorithm.discriminator_warmup
        seconds = 0.0
        if key not in self._warm:
            start = time.process_time()
            discriminator = self.discriminator(config)
            self._stage("warmup", student, discriminator, config, watch)
            self._warm[key] = self._copied((student, discriminator, curve)), time.process_time() - start
        else:
            (student, discriminator, points), seconds = self._copied(self._warm[key])
            curve += points
        return student, discriminator, seconds

    def _copied(self, what: Any) -> Any:
        # The template holds a lock, which cannot be copied, and nothing that changes.
        return copy.deepcopy(what, {id(self.template): self.template})

    def fresh(self, student: Student) -> dict[str, Any]:
        """Accuracy of discriminators that are new, on the watched prompts."""
        found = fresh_discriminator(
            self.sampled(student, self.watched), lambda: self.discriminator(self.config, seed=500 + self.seed), FRESH
        )
        return {"accuracy": found.accuracy, "low": found.interval[0], "high": found.interval[1]}

    def oracle(self, config: Config, student: Student) -> toy.Oracle:
        def teacher(prompt: Prompt, response: Response) -> float:
            return self.language.score(prompt.messages[0]["content"], response.text, response.finished)[0]

        return toy.Oracle(config.discriminator, teacher, lambda prompt, y: log_q(student, [Group(prompt, y)])[0])

    def sampled(self, student: Student, groups: Sequence[Group]) -> list[Group]:
        """The groups with one sample each, by the same random numbers every time."""
        requests = [SampleRequest(g.prompt.token_ids, 1, 77_000 + i) for i, g in enumerate(groups)]
        engine = LanguageEngine(student.model, self.template)
        drawn = engine.generate(requests, temperature=1.0, max_tokens=LONGEST)
        return [Group(g.prompt, g.teacher, samples) for g, samples in zip(groups, drawn, strict=True)]

    def measure(self, student: Student, groups: Sequence[Group]) -> dict[str, Any]:
        """valid: share of samples that the teacher could have said. log_p: mean log p of a sample, nats. reverse_kl:
        mean of log q - log p over samples, forward_kl: of log p - log q over the teacher's. ngram_f1, lengths."""
        groups = self.sampled(student, groups)
        scored = [self._score(g, g.samples[0]) for g in groups]
        taught = [self._score(g, g.teacher)[0] for g in groups]
        samples = [g.samples[0] for g in groups]
        return {
            "valid": fmean(valid for _, valid in scored),
            "log_p": fmean(log_p for log_p, _ in scored),
            "reverse_kl": fmean(sum(s.logprobs) - log_p for s, (log_p, _) in zip(samples, scored, strict=True)),
            "forward_kl": fmean(taught) - fmean(log_q(student, groups)),
            "ngram_f1": {
                str(n): fmean(ngram_f1(g.samples[0].text, g.teacher.text, n) for g in groups) for n in (1, 2, 3, 4)
            },
            "length": fmean(len(s.token_ids) for s in samples),
            "teacher_length": fmean(len(g.teacher.token_ids) for g in groups),
            "cut": fmean(not s.finished for s in samples),
        }

    def _score(self, group: Group, response: Response) -> tuple[float, bool]:
        return self.language.score(group.prompt.messages[0]["content"], response.text, response.finished)


@torch.no_grad()
def log_q(student: Student, groups: Sequence[Group]) -> list[float]:
    """log q(teacher's response | prompt), nats."""
    tokens = [GroupTokens(g.prompt.token_ids, (g.teacher.token_ids,)) for g in groups]
    batch = GroupedBatch.of(tokens, last_tokens=False)
    logprob = student.logprobs(student.model, batch, 1.0)
    return [part.sum().item() for part in logprob.split(list(batch.lengths))]
