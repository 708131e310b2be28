"""From rows to batches of groups: tokens within the limits, a report of what was cut, and a stateful loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from gadcore.config.data import DataSettings
from gadcore.data.facts import Facts, Lengths, Survey
from gadcore.data.forms import RawRow
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.reasoning import of_teacher, reasons
from gadcore.data.rows import BadRow, BadRows, no_rows
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError

# Above this share of rows a loss of text is no matter of single rows.
_MANY = 0.1
# Rows that are encoded by one call of the tokenizer.
_CHUNK = 512


@dataclass(frozen=True)
class DataReport:
    """What became of a data set under the length limits.

    rows: rows given; truncated_prompts, cut_responses: rows used with less than their text;
    dropped_prompts, dropped_responses: rows not used because the prompt, or the response, is too long;
    mean_response_tokens: of the teacher's responses in use, end marker included;
    ended: responses whose text ended in the end marker, which was taken off; reasoned: those with a block of reasoning;
    skipped: what was left out before, a sentence with its list; facts: of all rows.
    """

    rows: int
    truncated_prompts: int
    dropped_prompts: int
    cut_responses: int
    dropped_responses: int
    mean_response_tokens: float
    ended: int = 0
    skipped: str = ""
    facts: Facts | None = field(default=None, compare=False)
    reasoned: int = 0

    def sentences(self) -> list[str]:
        """What the user should be told: one line for every kind of row that was shortened or left out."""
        told = [*(sentence for count, sentence in self._losses() if count), *self._missing()]
        if self.ended:
            told.append(
                f"{self.ended} of {self.rows} teacher responses ended in the text of an end marker, which was taken off"
            )
        if self.reasoned:
            told.append(f"{self.reasoned} of {self.rows} teacher responses have a block of reasoning (data.reasoning)")
        return ([self.skipped] if self.skipped else []) + told

    def warnings(self) -> list[str]:
        """Of the sentences, those that no run should begin without.

        Text of more than a tenth of the rows is lost, or a student would learn the word of a missing value.
        """
        return [*(sentence for count, sentence in self._losses() if count > _MANY * self.rows), *self._missing()]

    def _missing(self) -> list[str]:
        if not self.facts or not self.facts.missing:
            return []
        count = sum(self.facts.missing.values())
        words = ", ".join(f"{word} {times}" for word, times in self.facts.missing.items())
        return [
            f"{count} of {self.rows} teacher responses are nothing but the word of a missing value ({words}): take out "
            f"those that are no answers, {self.facts.named('missing', count)}"
        ]

    def _losses(self) -> list[tuple[int, str]]:
        prompt, response = (self.facts.prompt, self.facts.response) if self.facts else (None, None)
        told = (
            (self.truncated_prompts, "prompts were truncated to data.max_prompt_tokens", prompt),
            (self.dropped_prompts, "rows were left out because their prompt is too long", prompt),
            (self.cut_responses, "teacher responses were cut at data.max_response_tokens", response),
            (self.dropped_responses, "rows were left out because the teacher's response is too long", response),
        )
        return [(count, f"{count} of {self.rows} {what}{_needed(lengths)}") for count, what, lengths in told]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DataReport:
        return cls(**{**content, "facts": Facts.from_json(content["facts"])})


def _needed(lengths: Lengths | None) -> str:
    if lengths is None:
        return ""
    return f": the limit is {lengths.limit} tokens, 95 % of the rows need {lengths.p95}, 99 % {lengths.p99}"


class Encoder:
    """Makes groups of rows: tokens within the limits. What became of the rows is in report() when all are through."""

    def __init__(
        self, template: ChatTemplate, settings: DataSettings, bad: BadRows, *, cut_limit: int | None = None
    ) -> None:
        """bad: gets the rows whose conversation the template refuses. cut_limit: as of build_prompts()."""
        self._template, self._settings, self._bad = template, settings, bad
        self._limit = settings.max_response_tokens if cut_limit is None else cut_limit
        self._survey = Survey()
        self._counts = Counter[str]()
        self._used = self._response_tokens = 0
        # Rows that break a limit under the policy "error": told even where bad rows are skipped.
        self._refused = BadRows()

    def groups(self, rows: Iterable[RawRow]) -> Iterator[Group]:
        """Groups without samples, one per usable row, in order; a prompt's index is its row's position in `rows`."""
        numbered = enumerate(rows)
        while chunk := list(islice(numbered, _CHUNK)):
            self._counts["rows"] += len(chunk)
            usable = [item for index, row in chunk if (item := self._readable(index, row)) is not None]
            prompts = self._template.encode_all([text for _, _, text, _ in usable])
            responses = self._template.responses_ids([text for *_, text in usable], [True] * len(usable))
            for (index, row, _, text), prompt, response in zip(usable, prompts, responses, strict=True):
                try:
                    self._template.embedded(prompt)
                except UserError as error:
                    self._bad.add(BadRow(row.where, str(error)))
                    continue
                self._survey.add(row, len(prompt), len(response))
                if (group := self._fitted(index, row, prompt, text, response)) is not None:
                    self._used += 1
                    self._response_tokens += len(group.teacher.token_ids)
                    yield group

    def report(self, source: str, *, skip: bool, may_skip: bool = True) -> DataReport:
        """Raises UserError for rows that the policy "error" refuses, for bad ones, and where none is left.

        skip: bad ones are left out, unless there are nothing but bad ones. may_skip: as of BadRows.error().
        """
        if self._refused.count:
            self._refused.read = self._bad.read or self._counts["rows"]
            raise self._refused.error(source)
        if self._bad.count and (not skip or self._bad.all):
            raise self._bad.error(source, may_skip=may_skip)
        counts = self._counts
        report = DataReport(
            counts["rows"],
            counts["truncated"],
            counts["dropped prompt"],
            counts["cut"],
            counts["dropped response"],
            self._response_tokens / self._used if self._used else 0.0,
            counts["ended"],
            self._bad.sentence(source) if self._bad.count else "",
            self._survey.facts(self._settings.max_prompt_tokens, self._limit),
            counts["reasoned"],
        )
        if not self._used:
            if not counts["rows"] and not report.skipped:
                raise no_rows(source)
            raise UserError(f"no usable rows are left: {'; '.join(report.sentences()) or 'there were none'}")
        return report

    def _readable(self, index: int, row: RawRow) -> tuple[int, RawRow, str, str] | None:
        """(index, row, rendered prompt, response without an end marker); None for a bad row."""
        text = self._template.without_end(row.teacher_response)
        try:
            if not text.strip():
                raise UserError("the response is nothing but an end marker: remove the row or fill it in")
            answer = of_teacher(text, self._settings.reasoning)
            rendered = self._template.rendered(row.messages)
        except UserError as error:
            self._bad.add(BadRow(row.where, str(error)))
            return None
        self._counts["ended"] += text != row.teacher_response
        self._counts["reasoned"] += reasons(text)
        return index, row, rendered, answer

    def _fitted(
        self, index: int, row: RawRow, prompt_ids: tuple[int, ...], text: str, ids: tuple[int, ...]
    ) -> Group | None:
        settings, finished = self._settings, True
        messages: Sequence[Mapping[str, str]] = row.messages
        if len(prompt_ids) > settings.max_prompt_tokens:
            try:
                fitted = self._template.fit_prompt(messages, settings.max_prompt_tokens, settings.long_prompt)
            except UserError as error:
                self._refused.add(BadRow(row.where, str(error)))
                return None
            if fitted is None:
                self._counts["dropped prompt"] += 1
                return None
            # A model with another vocabulary renders the messages anew: it must see the same, perhaps shorter prompt.
            messages, prompt_ids = fitted
        if len(ids) > self._limit:
            if settings.long_response == "error":
                reason = (
                    f"the teacher's response has {len(ids)} tokens, data.max_response_tokens allows {self._limit}: "
                    'raise it, or set data.long_response to "cut" or "drop"'
                )
                self._refused.add(BadRow(row.where, reason))
                return None
            if settings.long_response == "drop":
                self._counts["dropped response"] += 1
                return None
            ids = ids[: self._limit]
            text, finished = self._template.text_of(ids)
            self._counts["cut"] += 1
        self._counts["truncated"] += messages is not row.messages
        prompt = Prompt(index, tuple(self._template.conversation(messages)), prompt_ids)
        return Group(prompt, Response(text, ids, finished))


def build_prompts(
    rows: Sequence[RawRow], template: ChatTemplate, settings: DataSettings, *, cut_limit: int | None = None
) -> tuple[list[Group], DataReport]:
    """Groups without samples, one per usable row, in order; a prompt's index is its row's position in `rows`.

    cut_limit: tokens of a teacher response, end marker included; default settings.max_response_tokens. A response
      that is cut has no end marker and finished=False, as a sample that ran into the same limit.

    Raises UserError under the policy "error", for a conversation that the template refuses, and when no row is left.
    """
    bad = BadRows(read=len(rows))
    encoder = Encoder(template, settings, bad, cut_limit=cut_limit)
    groups = list(encoder.groups(rows))
    return groups, encoder.report("the data", skip=False, may_skip=False)


class Loader:
    """Batches of groups, and an endless iterator over them that can be saved and restored within an epoch.

    The order of an epoch is a function of (seed, epoch) alone. Every epoch uses each group once: its last batch is
    smaller where `batch_size` does not divide the number of groups, and with fewer groups than `batch_size` each epoch
    is that one smaller batch. Batches hold fresh groups without samples; the groups given are never changed.

    epoch, position: the iterator's next batch, position counted in batches from the start of the epoch.
    """

    def __init__(self, groups: Sequence[Group], batch_size: int, seed: int) -> None:
        self._groups = groups
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 0
        self.position = 0

    @property
    def groups(self) -> Sequence[Group]:
        """What the batches are made of, in its own order."""
        return self._groups

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, the smaller last one included."""
        return -(-len(self._groups) // self._batch_size)

    def batch(self, epoch: int, position: int) -> list[Group]:
        """The batch at `position` (from 0, in batches) of an epoch; leaves the iterator as it is."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._groups))
        start = position * self._batch_size
        chosen = (self._groups[i] for i in order[start : start + self._batch_size])
        return [Group(group.prompt, group.teacher) for group in chosen]

    def batches(self, epoch: int) -> Iterator[list[Group]]:
        """All batches of one epoch; leaves the iterator as it is."""
        return (self.batch(epoch, position) for position in range(self.steps_per_epoch))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Group]:
        batch = self.batch(self.epoch, self.position)
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def state(self) -> dict[str, int]:
        """JSON-able: the iterator's next batch, and what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, **self._order()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on at a saved state; UserError where the order would be another one."""
        for name, mine in self._order().items():
            if state[name] != mine:
                raise UserError(
                    f"the checkpoint goes on with {name} = {state[name]}, this run has {name} = {mine}: "
                    "keep the data, the batch size and the seed of the run, or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _order(self) -> dict[str, int]:
        return {"rows": len(self._groups), "batch_size": self._batch_size, "seed": self._seed}
