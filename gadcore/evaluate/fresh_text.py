"""The fresh-discriminator test on responses on disk, with a language model as the discriminator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from gadcore.data.groups import Group, Prompt, Response
from gadcore.evaluate.responses import ResponseRow, digest_of, write_json
from gadcore.evaluate.sampling import Log, identity
from gadcore.evaluate.settings import FreshModelSettings
from gadcore.measure.fresh import fresh_discriminator
from gadcore.models.discriminator import Discriminator
from gadcore.models.loading import load_discriminator
from gadcore.models.spec import ModelSpec
from gadcore.record.reading import Finite, fitting, read_json


@dataclass(frozen=True)
class _Kept:
    """What an evaluation reads of fresh-<model>.json."""

    accuracy: Finite
    interval: tuple[Finite, Finite]
    n: int
    margin: Finite
    train_accuracy: Finite
    steps: int
    correct: list[Finite]


_KEPT = TypeAdapter(_Kept)


class TextTest:
    """The test with the model at `path` as the untrained discriminator, on `device`.

    Conversations are rendered by that model's own template, and both sides get its end marker where they ended by
    themselves: texts cross, not tokens, so the student may have another vocabulary.
    """

    def __init__(self, path: str, settings: FreshModelSettings, device: torch.device, log: Log) -> None:
        self.path = path
        self.settings = settings
        self.device = device
        self.log = log
        self.template = ModelSpec.resolve(path).template
        self.weights = identity(path)

    def run(self, rows: Sequence[ResponseRow], kept: Path) -> dict[str, Any]:
        """FreshResult as JSON, plus "of", what it was made from; read from `kept` where that holds the same test."""
        of = self._made_from(rows)
        if kept.is_file() and (before := read_json(kept)).get("of") == of:
            fitting(_KEPT, before, kept, "delete it and run eval again")
            return before
        begin = time.perf_counter()
        result = fresh_discriminator(self.groups(rows), self.maker(), self.settings)
        seconds = time.perf_counter() - begin
        self.log(f"  {kept.stem}: {result.steps} steps, tells {100 * result.accuracy:.0f} % apart, {seconds:.0f} s")
        found = {**vars(result), "of": of}
        write_json(kept, found)
        return found

    def groups(self, rows: Sequence[ResponseRow]) -> list[Group]:
        """A group of one sample per row."""
        return [
            Group(
                Prompt(row.index, row.messages, self.template.prompt_ids(row.messages)),
                self._response(row.reference, row.reference_finished),
                [self._response(row.response, row.finished)],
            )
            for row in rows
        ]

    def maker(self) -> Callable[[], Discriminator]:
        """A function that loads a new discriminator, with the same fresh head each time."""
        settings = self.settings

        def make() -> Discriminator:
            model = load_discriminator(
                self.path,
                settings.dtype,
                device=self.device,
                seed=settings.seed,
                end_id=self.template.end_id,
                tokenizer=self.template.tokenizer,
            )
            return Discriminator(
                model,
                self.template,
                settings.discriminator(),
                same_vocabulary=True,
                micro_batch_tokens=settings.micro_batch_tokens,
            )

        return make

    def _response(self, text: str, finished: bool) -> Response:
        return Response(text, self.template.response_ids(text, finished=finished), finished)

    def _made_from(self, rows: Sequence[ResponseRow]) -> dict[str, Any]:
        texts = [(r.messages, r.reference, r.reference_finished, r.response, r.finished) for r in rows]
        return {
            "texts": digest_of(texts),
            "weights": self.weights,
            **self.settings.model_dump(exclude={"enabled", "model"}),
        }
