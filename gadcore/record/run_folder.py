"""The folder of a run: what lies where, and who may write into it.

A run begins to exist with its config.toml, which is there whole or not at all; from then on it can be resumed. While
it runs its process holds the folder's lock. runs/latest is the run of runs/ that took a step last.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from gadcore.config.loading import dump
from gadcore.config.settings import Config
from gadcore.errors import Interrupted, UserError, is_users
from gadcore.files import LOCK, clear_temporaries, free_name, held, remove, replace_link, sync, write_jsonl, write_whole
from gadcore.record.tracking import MetricsLog, Row

RUNS = Path("runs")
LATEST = RUNS / "latest"
# Everything that a run may write into its folder. A new run takes no folder that has any of it, so all of it is the
# run's own.
CONFIG, SUMMARY, TILES = "config.toml", "summary.json", "tiles.json"
RECORDS = ("metrics.jsonl", "samples.jsonl", "evaluations")
DOCTOR_D = "doctor-d.json"
RESULTS = (SUMMARY, "report.html", "student", "discriminator", DOCTOR_D)
OTHERS = ("checkpoints", "reference", "snapshot", "trace.json", "offload", "tracker.json", TILES)
TRACKERS = ("tensorboard", "wandb", "mlflow.db", "mlflow-artifacts")
NAMES = (CONFIG, *RECORDS, *RESULTS, *OTHERS, *TRACKERS)


@dataclass
class RunFolder:
    """config.toml, metrics.jsonl, samples.jsonl, evaluations/, checkpoints/, reference/, student/, discriminator/,
    summary.json, report.html and, where it was asked for, trace.json of one run; tiles.json of one on a GPU.

    has_step: whether this process has recorded a step.
    """

    path: Path
    metrics: MetricsLog = field(init=False)
    samples: MetricsLog = field(init=False)
    has_step: bool = False
    _tiles: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self.metrics, self.samples = (MetricsLog(self.path / name) for name in RECORDS[:2])

    @classmethod
    def existing(cls, directory: str | None) -> RunFolder:
        """The folder of a run to look at or to go on with: the one named, or the newest."""
        path = Path(directory) if directory else LATEST.resolve()
        if not (path / CONFIG).is_file():
            raise UserError(
                f"there is no run to resume in {path}: give its folder by --run.dir, or leave --resume away"
            )
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def reference(self) -> Path:
        """The saved reference policy of the GAD stage."""
        return self.path / "reference"

    @property
    def snapshot(self) -> Path:
        """What the baseline `soda` learns from beside the teacher's responses (gadcore.train.snapshot)."""
        return self.path / "snapshot"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    def summary(self) -> dict[str, Any] | None:
        """What the run wrote when it was finished; None: it is not. UserError where that is damaged."""
        return _object(self.path / SUMMARY, "have the run finish again by --resume auto")

    def keep_config(self, config: Config, step: int) -> None:
        """Writes the settings that a resumed run goes on with; the ones before are kept as config-<step>.toml."""
        current, kept = self.path / CONFIG, dump(config.started_new())
        before = current.read_text(encoding="utf-8")
        if before != kept:
            # Beside it first: a run without a config.toml would be none.
            write_whole(free_name(self.path / f"config-{step:06d}", ".toml"), before, synced=True)
            write_whole(current, kept, synced=True)

    def keep_tiles(self, tiles: Mapping[str, Any]) -> None:
        """Writes what gadcore.kernels.tiles.chosen_tiles() gave, where it is something new."""
        text = json.dumps(tiles, indent=1) + "\n"
        if tiles and text != self._tiles:
            write_whole(self.path / TILES, text, synced=True)
            self._tiles = text

    def kept_tiles(self) -> dict[str, Any]:
        """What keep_tiles() wrote, in this process or an earlier one; {} where it wrote nothing.

        UserError where that is damaged.
        """
        otherwise = (
            "have the kernels choose their tiles anew, with which the run may differ in its last bits from the one "
            "that was stopped"
        )
        return _object(self.path / TILES, otherwise) or {}

    def step(self, row: Row) -> None:
        """Records a step's figures. The first one makes a run of runs/ the latest."""
        self.metrics.write(row)
        if not self.has_step:
            self.has_step = True
            if _belongs_to_runs(self.path):
                replace_link(LATEST, self.path)

    def write_evaluation(self, name: str, rows: list[dict[str, Any]]) -> None:
        write_jsonl(self.path / "evaluations" / f"{name}.jsonl", rows, synced=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        # A tokenizer can produce a lone half of a surrogate pair.
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_whole(self.path / SUMMARY, text, errors="backslashreplace", synced=True)

    def sync(self) -> None:
        """Returns when all records so far are on the disk: a checkpoint that counts on them may follow."""
        self.metrics.sync()
        self.samples.sync()
        sync(self.path)

    def counts(self) -> dict[str, int]:
        """Lines of every file of records but metrics.jsonl, whose rows are numbered."""
        files = [self.samples.path, *sorted((self.path / "evaluations").glob("*.jsonl"))]
        return {str(file.relative_to(self.path)): _lines(file) for file in files if file.exists()}

    def digests(self, counts: Mapping[str, int]) -> dict[str, str]:
        """Of the first lines of files of records; counts: {file: how many}, and all of metrics.jsonl."""
        name = self.metrics.path.name
        lines = {name: _lines(self.metrics.path)} if self.metrics.path.exists() else {}
        return {f"{file}:{count}": _digest(self.path / file, count) for file, count in {**lines, **counts}.items()}

    def check(self, step: int, counts: Mapping[str, int], digests: Mapping[str, str]) -> None:
        """Raises UserError where records are missing, or changed, that were there at a checkpoint.

        counts, digests: as then; an older gadcore kept no digests.
        """
        counted = Counter(self.metrics.steps())
        for row in range(1, step + 1):
            if (count := counted[row]) != 1:
                raise UserError(f"{self.metrics.path} has {count or 'no'} rows of step {row}")
        for name, count in counts.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file} is missing")
            if (lines := _lines(file)) < count:
                raise UserError(f"{file} has {lines} rows, at the checkpoint it had {count}")
        for key, digest in digests.items():
            name, _, first = key.rpartition(":")
            if _digest(self.path / name, int(first)) != digest:
                raise UserError(f"{self.path / name} has been changed in its first {first} rows")

    def go_back(self, step: int, evaluations: Collection[str]) -> Path | None:
        """Sets aside what the run did after a step, in a folder abandoned-after-<step>; returns it, None: nothing.

        evaluations: names of those that were made before. Records are copied, since they are cut back where the run
        goes on.
        """
        logs = [log for log in (self.metrics, self.samples) if any(row > step for row in log.steps())]
        results = [self.path / name for name in RESULTS]
        made = [file for file in (self.path / "evaluations").glob("*.jsonl") if file.stem not in evaluations]
        later = [path for path in (*results, *made) if path.exists()]
        if not later and not logs:
            return None
        aside = free_name(self.path / f"abandoned-after-{step:06d}")
        for log in logs:
            write_whole(aside / log.path.name, log.path.read_bytes(), synced=True)
        # The summary first: without it the run is not finished.
        for path in later:
            place = aside / path.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        return aside


@contextmanager
def run_folder(config: Config) -> Iterator[RunFolder]:
    """The folder of the run that the settings start or resume, and its lock while the block runs.

    Of a new run that fails before its first step nothing stays; one that is stopped can be resumed.
    Raises UserError where the folder is in use, holds another run, or holds none to resume.
    """
    with ExitStack() as stack:
        if config.run.resume:
            path = RunFolder.existing(config.run.dir).path
            stack.enter_context(held(path / LOCK, f"the run {path}"))
            for place in (path, path / "evaluations"):
                clear_temporaries(place)
            folder = RunFolder.existing(str(path))
            with _told(folder, stays=True):
                yield folder
            return
        path = stack.enter_context(_new(config))
        folder = RunFolder(path)
        with _told(folder, stays=False):
            try:
                write_whole(path / CONFIG, dump(config.started_new()), synced=True)
                yield folder
            except BaseException as error:
                if not folder.has_step and not isinstance(error, Interrupted):
                    for name in NAMES:
                        remove(path / name)
                raise


@contextmanager
def _told(folder: RunFolder, *, stays: bool) -> Iterator[None]:
    """Makes sentences of Ctrl-C and of a full disk, with what goes on with this very run.

    stays: whether there is a run to go on with before its first step here.
    """
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        then = f"go on with --run.dir {shlex.quote(str(folder.path))} --resume auto"
        if not stays and not folder.has_step:
            then = "nothing is left of this start, give the same command again"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"stopped at once; {then}") from None
        if not is_users(error):
            raise
        raise UserError(f"{error.filename or folder.path}: {error.strerror}; mend that, then {then}") from error


@contextmanager
def _new(config: Config) -> Iterator[Path]:
    """A folder for a new run, locked; it goes again where nothing is in it at the end, with the ones made for it."""
    if LATEST.exists() and not LATEST.is_symlink() and _belongs_to_runs(Path(config.run.dir or LATEST)):
        raise UserError(f"{LATEST} is in the way: it should be a link to the newest run, move it elsewhere")
    made = [] if config.run.dir or RUNS.exists() else [RUNS]
    path = Path(config.run.dir) if config.run.dir else _fresh(config.run.name)
    # Where a process may be at work the lock is asked first: it knows which one.
    if not (path / LOCK).exists():
        _refuse_another_run(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()] if config.run.dir else [path, *made]
    try:
        _make(path)
        with held(path / LOCK, f"the run {path}"):
            # Somebody may have come first.
            _refuse_another_run(path)
            # Of a start that was killed before its config.toml was whole.
            clear_temporaries(path)
            yield path
    finally:
        for folder in made:
            if folder.is_dir() and not os.listdir(folder):
                folder.rmdir()


def check_free(config: Config) -> None:
    """Before anything slow: raises UserError where a new run cannot have its folder, as run_folder() does later."""
    if config.run.resume or config.run.dir is None:
        return
    path = Path(config.run.dir)
    if not (path / LOCK).exists():
        _refuse_another_run(path)
        return
    # The lock knows which process is at work there.
    with held(path / LOCK, f"the run {path}"):
        _refuse_another_run(path)


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)
        raise UserError(f"{file} is a file where a folder is needed: choose another run.dir") from error


def _refuse_another_run(path: Path) -> None:
    if (path / CONFIG).exists():
        raise UserError(
            f"{path} already holds another run: choose another run.dir, or go on with it by --run.dir "
            f"{shlex.quote(str(path))} --resume auto"
        )
    for name in NAMES:
        if os.path.lexists(path / name):
            raise UserError(
                f"{path / name} is there already and would be mixed with the new run: choose another run.dir"
            )


def _object(path: Path, otherwise: str) -> dict[str, Any] | None:
    """A JSON object of the folder, None where there is none. UserError where it is damaged; otherwise: what deleting it
    and going on leads to."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): put it back, or delete it and {otherwise}") from None
    return found


def _belongs_to_runs(path: Path) -> bool:
    return RUNS.resolve() in path.resolve().parents


def _fresh(name: str) -> Path:
    """A folder of runs/ that no other process has taken: it is made."""
    while True:
        path = free_name(RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def _digest(path: Path, lines: int) -> str:
    """Of the first lines of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        for line in islice(file, lines):
            digest.update(line)
    return digest.hexdigest()


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
