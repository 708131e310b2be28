"""From rows to batches of groups: tokens within the limits, a report of what was cut, and a stateful loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gadcore.config.settings import DataSettings
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.rows import RawRow
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError


@dataclass(frozen=True)
class DataReport:
    """What became of a data set under the length limits.

    rows: rows given; truncated_prompts, cut_responses: rows used with less than their text;
    dropped_prompts, dropped_responses: rows not used because the prompt, or the response, is too long;
    mean_response_tokens: of the teacher's responses in use, end marker included.
    """

    rows: int
    truncated_prompts: int
    dropped_prompts: int
    cut_responses: int
    dropped_responses: int
    mean_response_tokens: float

    def sentences(self) -> list[str]:
        """What the user should be told: one line for every kind of row that was shortened or left out."""
        told = {
            "prompts were truncated to data.max_prompt_tokens": self.truncated_prompts,
            "rows were left out because their prompt is too long": self.dropped_prompts,
            "teacher responses were cut at data.max_response_tokens": self.cut_responses,
            "rows were left out because the teacher's response is too long": self.dropped_responses,
        }
        return [f"{count} of {self.rows} {what}" for what, count in told.items() if count]


def build_prompts(
    rows: Sequence[RawRow], template: ChatTemplate, settings: DataSettings, *, cut_limit: int | None = None
) -> tuple[list[Group], DataReport]:
    """Groups without samples, one per usable row, in order; a prompt's index is its row's position in `rows`.

    cut_limit: tokens of a teacher response, end marker included; default settings.max_response_tokens. A response
      that is cut has no end marker and finished=False, as a sample that ran into the same limit.

    Raises UserError under the policy "error", for a conversation that the template refuses, and when no row is left.
    """
    limit = settings.max_response_tokens if cut_limit is None else cut_limit
    groups: list[Group] = []
    truncated = dropped_prompts = cut = dropped_responses = 0
    for index, row in enumerate(rows):
        try:
            fitted = template.fit_prompt(row.messages, settings.max_prompt_tokens, settings.long_prompt)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        if fitted is None:
            dropped_prompts += 1
            continue
        # A model with another vocabulary renders the messages anew: it must see the same, perhaps shorter prompt.
        messages, prompt_ids = fitted
        text, finished = row.teacher_response, True
        ids = template.response_ids(text, finished=True)
        if len(ids) > limit:
            if settings.long_response == "error":
                raise UserError(
                    f"{row.where}: the teacher's response has {len(ids)} tokens, data.max_response_tokens allows "
                    f'{limit}: raise it, or set data.long_response to "cut" or "drop"'
                )
            if settings.long_response == "drop":
                dropped_responses += 1
                continue
            ids = ids[:limit]
            text, finished = template.text_of(ids)
            cut += 1
        truncated += messages is not row.messages
        prompt = Prompt(index, tuple(template.conversation(messages)), prompt_ids)
        groups.append(Group(prompt, Response(text, ids, finished)))
    lengths = [len(group.teacher.token_ids) for group in groups]
    report = DataReport(
        len(rows), truncated, dropped_prompts, cut, dropped_responses, float(np.mean(lengths)) if lengths else 0.0
    )
    if not groups:
        raise UserError(f"no usable rows are left: {'; '.join(report.sentences()) or 'there were none'}")
    return groups, report


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
