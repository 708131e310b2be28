"""SODA's snapshot: samples of the student as it was when the stage began, and the reference log-probs, once a row.

It is kept in the run's folder in parts of some rows, each whole or absent, so that a run that is stopped goes on with
the part that it was at. Parts are read from the disk as they are needed: memory holds where a row stands, not its text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gadcore.config.settings import AlgorithmSettings
from gadcore.data.groups import Group, Response
from gadcore.errors import UserError
from gadcore.files import remove, write_whole
from gadcore.models.preference import sequence_logprobs
from gadcore.models.student import Student
from gadcore.record.run_folder import RunFolder
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.weights import fingerprint
from gadcore.train.agreement import of_first
from gadcore.train.phases import Phases

# Rows of a part.
PART = 256
MADE_FROM = "made-from.json"
_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "text": pa.list_(pa.string()),
        "tokens": pa.list_(pa.list_(pa.int32())),
        "finished": pa.list_(pa.bool_()),
        "reference": pa.list_(pa.float64()),
    }
)


class Snapshot:
    """Samples and reference log-probs of every row of a data set, by the row's index."""

    def __init__(
        self,
        folder: RunFolder | None,
        groups: Sequence[Group],
        sampler: Sampler,
        student: Student,
        phases: Phases,
        algorithm: AlgorithmSettings,
    ) -> None:
        """folder: of the run that keeps it; None: in memory alone. groups: the rows."""
        self.folder = None if folder is None else folder.snapshot
        self._groups, self._samples = groups, algorithm.soda_samples
        self._sampler, self._student, self._phases, self._world = sampler, student, phases, student.world
        self._tokens = 0
        # index -> (samples, reference), or the part and the row in it.
        self._rows: dict[int, tuple[list[Response], list[float]]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._parts: list[pa.RecordBatch] = []

    def take(self, *, begun: bool, say: Callable[[str], None], pause: Callable[[], None]) -> int:
        """Draws what is missing of it; returns the tokens of all samples, 0 where they have been counted before.

        begun: the stage has made steps, so that the student is another one by now: all of it must be there.
        say: is told how far it is. pause: called before every part.
        Raises UserError where it must be there and is not, or was made from something else.
        """
        if self.folder is not None:
            self._begin(begun=begun)
        for number, start in enumerate(range(0, len(self._groups), PART)):
            path = self.folder / f"part-{number:06d}.arrow" if self.folder is not None else None
            if path is None or not of_first(self._world, path.is_file):
                if begun and path is not None:
                    raise self._lost(f"{path.name} is missing")
                pause()
                say(f"sampling the snapshot: {start} of {len(self._groups)} rows are there")
                rows = [Group(group.prompt, group.teacher) for group in self._groups[start : start + PART]]
                reference = self._drawn(rows)
                if path is None:
                    self._keep(rows, reference)
                    continue
                with self._world.agreeing():
                    if self._world.is_first:
                        write_whole(path, _bytes(rows, reference), synced=True)
            self._read(path, number)
        return 0 if begun else self._tokens

    def _drawn(self, groups: Sequence[Group]) -> list[list[float]]:
        """Gives groups their samples; per group the log-probs of its teacher's response and its samples."""
        self._sampler.draw(groups, self._samples, "soda")
        with self._phases("student"):
            return sequence_logprobs(self._student, groups)

    def _keep(self, groups: Sequence[Group], reference: Sequence[list[float]]) -> None:
        for group, row in zip(groups, reference, strict=True):
            self._rows[group.prompt.index] = group.samples, row
            self._tokens += sum(len(sample.token_ids) for sample in group.samples)

    def of(self, groups: Sequence[Group]) -> list[list[float]]:
        """Gives every group its samples; per group the reference log-probs of its teacher's response and of them."""
        found = [self._row(group.prompt.index) for group in groups]
        for group, (samples, _) in zip(groups, found, strict=True):
            group.samples = samples
        return [reference for _, reference in found]

    def _row(self, index: int) -> tuple[list[Response], list[float]]:
        if self.folder is None:
            return self._rows[index]
        number, row = self._places[index]
        found = {name: self._parts[number].column(name)[row].as_py() for name in _SCHEMA.names}
        samples = [
            Response(text, tuple(ids), finished)
            for text, ids, finished in zip(found["text"], found["tokens"], found["finished"], strict=True)
        ]
        return samples, found["reference"]

    def _begin(self, *, begun: bool) -> None:
        """Keeps the parts that are there where they were made from the same, else none."""
        assert self.folder is not None
        made_from: dict[str, Any] = {
            "rows": len(self._groups),
            "part": PART,
            "samples": self._samples,
            "temperature": self._sampler.temperature,
            "max_tokens": self._sampler.max_tokens,
            "seed": self._sampler.seed,
        }
        path = self.folder / MADE_FROM
        before = of_first(self._world, lambda: _json(path))
        if begun:
            # The weights have moved on since.
            if not isinstance(before, dict) or {key: before.get(key) for key in made_from} != made_from:
                raise self._lost(f"{MADE_FROM} is missing or of other settings")
            return
        with self._phases("student"):
            own = f"{fingerprint(self._student.local_parameters().items()):032x}"
        made_from["weights"] = self._world.all_gather_objects(own)
        with self._world.agreeing():
            if before != made_from and self._world.is_first:
                remove(self.folder)
                write_whole(path, json.dumps(made_from, indent=1) + "\n", synced=True)

    def _read(self, path: Path, number: int) -> None:
        try:
            (part,) = pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_batches()
            indices = part.column("index").to_pylist()
            self._tokens += len(part.column("tokens").flatten().flatten())
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and start the run anew") from None
        self._parts.append(part)
        self._places |= {index: (number, row) for row, index in enumerate(indices)}

    def _lost(self, why: str) -> UserError:
        return UserError(
            f"the snapshot of the student that this run learns from is not in {self.folder} ({why}): put it back as it "
            "was, or start a new run"
        )


def _json(path: Path) -> Any:
    """None where there is none, or a broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def _bytes(groups: Sequence[Group], reference: Sequence[Sequence[float]]) -> bytes:
    rows = [
        {
            "index": group.prompt.index,
            # A tokenizer can produce a lone half of a surrogate pair, which Arrow does not take.
            "text": [s.text.encode(errors="replace").decode() for s in group.samples],
            "tokens": [s.token_ids for s in group.samples],
            "finished": [s.finished for s in group.samples],
            "reference": list(row),
        }
        for group, row in zip(groups, reference, strict=True)
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    return bytes(sink.getvalue())
