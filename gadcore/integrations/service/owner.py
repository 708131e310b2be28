"""The discriminator that is served: the one owner of model, device, journal and checkpoints."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gadcore.checkpoint import store
from gadcore.data.groups import Group
from gadcore.errors import UserError
from gadcore.files import whole_folder
from gadcore.integrations.service.journal import JSON, Journal
from gadcore.integrations.service.refused import Refused
from gadcore.integrations.service.settings import ServiceConfig
from gadcore.memory.colocation import Colocation
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.state import optimizer_tensors, restore_optimizer, restore_parameters

_log = logging.getLogger(__name__)
# An update that has ended so many processes is given up: its requests fail, the service goes on.
_MOST_ATTEMPTS = 3
NAME = "discriminator"


@dataclass(frozen=True)
class Request:
    """What an update is made of. groups: as the journal keeps them, with every text (rows.resolve())."""

    id: str
    digest: str
    groups: list[dict[str, Any]]


class Owner:
    """Used by one thread. asleep, frozen, version, model_s (seconds spent in the model) may be read by others."""

    def __init__(
        self, discriminator: Discriminator, config: ServiceConfig, *, on_update: Callable[[Scores, int], None]
    ) -> None:
        """on_update: told of the scores of every update, and how many groups it had.

        Raises UserError where service.dir holds another discriminator's journal, or one that cannot be gone on with.
        """
        self.discriminator, self.config = discriminator, config
        self._on_update = on_update
        self.folder = Path(config.service.dir).expanduser()
        self.journal = Journal(self.folder / "journal.sqlite")
        self._own, self._saved = self.folder / "checkpoints", self.folder / "saved"
        memory = config.memory.for_colocation()
        device = discriminator.model.device
        self._memory = Colocation(device, memory, Path(memory.dir or self.folder / "offload"), shared=False)
        self.asleep, self.model_s = False, 0.0
        self._since_checkpoint = 0
        self._settings = {"model": config.discriminator.model, "learning": _learning(config)}
        self.frozen = bool(self.journal.fact("frozen"))

    @property
    def version(self) -> int:
        return self.journal.newest or 0

    # From the start to the end

    def begin(self, warmup: Callable[[Discriminator], None]) -> list[str]:
        """Brings the model to where the journal is, or warms it up where there is none; returns notes, in sentences.

        warmup: trains a new discriminator. Afterwards the model may leave the device.
        """
        kept = self.journal.fact("settings")
        if kept is not None and kept["model"] != self._settings["model"]:
            raise UserError(
                f"{self.folder} belongs to the discriminator {kept['model']!r}: give that as discriminator.model, or "
                "another service.dir"
            )
        new = self.journal.newest is None
        if new:
            warmup(self.discriminator)
        self.discriminator.optimizer.allocate()
        self._memory.add("discriminator.optimizer", self.discriminator.optimizer.moments)
        self._memory.add("discriminator.parameters", self.discriminator.model.parameters)
        self._memory.add_gradients("discriminator.gradients", self.discriminator.model.parameters())
        self._memory.begin()
        if new:
            self._save(self._own, 0, self.config.service.keep)
            self.journal.set_facts({"settings": self._settings})
            self.journal.first()
            return []
        return self._go_on(kept)

    def close(self) -> None:
        """Saves, and writes the discriminator as a Hugging Face directory beside the checkpoints."""
        if self._since_checkpoint:
            self.checkpoint_own()
        self._memory.enter("discriminator")
        with whole_folder(self.folder / NAME, replace=True) as place:
            self.discriminator.save(place)
        self._memory.close()
        self.journal.close()

    # Requests

    def groups_of(self, texts: Sequence[Mapping[str, Any]]) -> list[Group]:
        """The groups of a request in D's tokens. UserError for one that does not fit."""
        made = [
            self.discriminator.group(
                group["messages"],
                group["teacher"],
                group["samples"],
                group["finished"],
                teacher_finished=group["teacher_finished"],
            )  # fmt: skip
            for group in texts
        ]
        self.discriminator.tokens(made)
        return made

    def score(self, groups: Sequence[Group]) -> Scores:
        """Under the present weights; nothing is trained."""
        with self._at_work("discriminator"):
            scores = self.discriminator.score(groups)
            _finite(scores)
        return scores

    def train(self, requests: Sequence[Request], groups: Sequence[Group]) -> Mapping[str, JSON]:
        """One update on the groups of all requests, in order; returns their answers by their ids.

        Raises Refused where the update cannot be made, which is each request's answer then.
        """
        try:
            version = self.journal.begin([(r.id, r.digest, r.groups) for r in requests])
        except sqlite3.OperationalError as error:
            raise _no_journal(self.journal, error) from error
        return self._make(version, requests, groups)

    def score_for(self, request: Request, groups: Sequence[Group]) -> JSON:
        """While frozen: the answer to a request that trains nothing, which a repetition gets again."""
        scores = self.score(groups)
        answer = next(iter(answers_of([request], scores, self.version, self.version).values()))
        try:
            self.journal.only_scored(request.id, request.digest, answer)
        except sqlite3.OperationalError as error:
            raise _no_journal(self.journal, error) from error
        return answer

    def checkpoint(self) -> int:
        """Saves the present version until service.keep_saved newer ones are there; returns it."""
        if self.version not in store.available(self._saved):
            self._save(self._saved, self.version, self.config.service.keep_saved)
        return self.version

    def checkpoint_own(self) -> None:
        """A checkpoint that a restart goes on from; texts that no restart needs are dropped."""
        self._save(self._own, self.version, self.config.service.keep)
        self._since_checkpoint = 0
        bases = [version for version in store.available(self._own) if self.journal.is_ancestor(version)]
        self.journal.forget(min(bases, default=0), self.config.service.keep_answers)

    def checkpoint_due(self) -> bool:
        # One that could not be written is tried again after as many updates.
        return self._since_checkpoint > 0 and self._since_checkpoint % self.config.service.checkpoint_every == 0

    def restore(self, version: int) -> int:
        """The weights and moments of a checkpoint, as a new version, which it returns."""
        places = store.available(self._own) | store.available(self._saved)
        if version not in places:
            known = ", ".join(map(str, sorted(places)))
            raise Refused(404, "unknown_version", f"there is no checkpoint of version {version}: there are {known}")
        new = self.version + 1
        saved = store.load(places[version]).tensors
        # The checkpoint is what makes it so: until it is there, a start goes on with the version before.
        store.save(self._own, new, saved, {"version": new, "source": version}, self.config.service.keep)
        self.journal.restored(new, version)
        self._set(saved)
        self._since_checkpoint = 0
        return new

    def freeze(self, frozen: bool) -> None:
        self.journal.set_facts({"frozen": frozen})
        self.frozen = frozen

    def sleep(self) -> None:
        """Returns when the device holds nothing of the model, as far as memory.offload has it leave."""
        self._memory.enter("rest")
        self.asleep = True

    def wake(self) -> None:
        self._memory.enter("discriminator")
        self.asleep = False

    # Inside

    def _make(self, version: int, requests: Sequence[Request], groups: Sequence[Group]) -> Mapping[str, JSON]:
        try:
            scores = self._update(groups)
        except UserError as error:
            told = {"code": "not_trained", "message": f"nothing was trained: {error}"}
            self.journal.fail(version, told)
            raise Refused(500, told["code"], told["message"]) from error
        answers = answers_of(requests, scores, version, version - 1)
        self.journal.end(version, answers)
        self._since_checkpoint += 1
        self._on_update(scores, len(groups))
        return answers

    def _update(self, groups: Sequence[Group]) -> Scores:
        """Discriminator.update() by turns on the device. Until the step, whatever happens leaves the weights."""
        try:
            with self._at_work("discriminator"):
                scores = self.discriminator.score(groups, backward=True)
                _finite(scores)
            with self._at_work("discriminator_update"):
                scores.grad_norm = self.discriminator.step()
        except BaseException:
            self.discriminator.discard()
            raise
        return scores

    @contextmanager
    def _at_work(self, state: Any) -> Iterator[None]:
        """UserError where the memory is full, but in a step, which may have been half made then."""
        start = time.perf_counter()
        with nullcontext() if state == "discriminator_update" else self._memory.explained():
            self._memory.enter(state)
            yield
            self._memory.finish_work()
        self.model_s += time.perf_counter() - start

    def _go_on(self, kept: Mapping[str, Any]) -> list[str]:
        """From the last checkpoint through the updates since, and the one that was begun when the process ended."""
        notes = []
        for version in sorted(store.available(self._own), reverse=True):
            # A kill between a restore's checkpoint and its entry.
            if version > self.version:
                source = store.load(store.at(self._own, version)).state["source"]
                self.journal.restored(version, source)
        bases = {**store.available(self._saved), **store.available(self._own)}
        while True:
            base, updates = self.journal.since(list(bases))
            try:
                saved = store.load(bases[base]).tensors
                break
            except UserError as error:
                notes.append(str(error))
                del bases[base]
        self._set(saved)
        if updates and kept["learning"] != self._settings["learning"]:
            raise UserError(
                f"{self.folder} has {len(updates)} updates since its last checkpoint, made with other settings "
                f"({kept['learning']}): start it with those once and stop it, then change them"
            )
        self.journal.set_facts({"settings": self._settings})
        worst = 0.0
        for version in updates:
            worst = max(worst, self._again(version))
        if updates:
            notes.append(f"{len(updates)} updates since the checkpoint of version {base} were made again")
        if worst:
            notes.append(f"their scores differ from those that were answered by {worst:.2g} at most")
        return notes

    def _again(self, version: int) -> float:
        """Makes an update of the journal; returns the largest difference to a score that was answered."""
        entries = self.journal.of_version(version)
        if not entries:
            raise UserError(f"{self.journal.path} has lost the texts of version {version}: choose another service.dir")
        requests = [Request(entry.id, entry.digest, entry.groups or []) for entry in entries]
        if entries[0].state == "begun" and self.journal.attempt(version) > _MOST_ATTEMPTS:
            told = f"the service ended {_MOST_ATTEMPTS} times while it was trained on this: nothing was trained"
            self.journal.fail(version, {"code": "not_trained", "message": told})
            return 0.0
        groups = [group for request in requests for group in self.groups_of(request.groups)]
        if entries[0].state == "begun":
            try:
                self._make(version, requests, groups)
            except Refused as refused:
                _log.warning("version %d, which was begun before the service ended: %s", version, refused)
            return 0.0
        again = answers_of(requests, self._update(groups), version, version - 1)
        self._since_checkpoint += 1
        return max(_difference(again[entry.id], entry.answer) for entry in entries)

    def _set(self, saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._memory.enter("discriminator_update")
        weights = self.discriminator.optimizer.weights(dict(self.discriminator.model.named_parameters()))
        restore_parameters(weights, saved[NAME], NAME)
        restore_optimizer(self.discriminator.optimizer.adamw, saved[f"{NAME}-optimizer"], weights)
        self.discriminator.optimizer.weights_changed()
        self.discriminator.discard()

    def _save(self, root: Path, version: int, keep: int) -> None:
        weights = self.discriminator.optimizer.weights(dict(self.discriminator.model.named_parameters()))
        tensors = {
            NAME: self._memory.readable(weights),
            f"{NAME}-optimizer": self._memory.readable(optimizer_tensors(self.discriminator.optimizer.adamw, weights)),
        }
        store.save(root, version, tensors, {"version": version, "source": None}, keep)


def answers_of(requests: Sequence[Request], scores: Scores, version: int, scored_by: int) -> dict[str, JSON]:
    """Of every request its answer, by its id, from the scores of all their groups."""
    rows = iter(zip(scores.teacher_scores, scores.rewards, strict=True))
    figures = {
        "version": version, "scored_by": scored_by, "trained": version != scored_by, "loss": scores.loss,
        "accuracy": scores.accuracy, "margin": scores.margin, "grad_norm": scores.grad_norm,
    }  # fmt: skip
    answers = {}
    for request in requests:
        groups = []
        for group in request.groups:
            teacher, rewards = next(rows)
            groups.append({"id": group["id"], "teacher_score": teacher, "scores": rewards})
        answers[request.id] = {"request_id": request.id, **figures, "groups": groups}
    return answers


def _no_journal(journal: Journal, error: sqlite3.OperationalError) -> Refused:
    message = f"nothing was trained, {journal.path} cannot be written ({error}): free some space, then ask again"
    return Refused(503, "no_journal", message, 10)


def _finite(scores: Scores) -> None:
    if not all(value - value == 0 for value in scores.vector()):
        raise UserError(
            "the discriminator's scores are not finite: go back to a checkpoint by /v1/restore, with a lower "
            "discriminator.lr"
        )


def _difference(again: JSON, answered: JSON) -> float:
    pairs = zip(again["groups"], answered["groups"], strict=True)
    return max(
        abs(a - b)
        for new, old in pairs
        for a, b in zip([new["teacher_score"], *new["scores"]], [old["teacher_score"], *old["scores"]], strict=True)
    )


def _learning(config: ServiceConfig) -> dict[str, Any]:
    """What decides how an update changes the weights."""
    return {
        **config.discriminator.model_dump(mode="json", exclude={"model"}),
        "micro_batch_tokens": config.service.micro_batch_tokens,
        "system_prompt": config.data.system_prompt,
        "template_arguments": config.data.template_arguments,
    }
