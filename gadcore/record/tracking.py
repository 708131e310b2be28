"""What a run writes down: metrics.jsonl and samples.jsonl, always, and a tracker on top where one is asked for.

The JSONL files are the record; report.html, resume and the tests read them. A tracker is a copy for people who look
at several runs side by side. So a tracker that cannot start stops the run before any work is done, and a tracker
that fails later is reported once and switched off, while the run goes on: its figures are all in metrics.jsonl.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from gadcore.errors import UserError
from gadcore.files import parse_json, sync, write_whole

Row = dict[str, Any]
logger = logging.getLogger(__name__)
_MISSING = 'tracking.tracker = "{0}" needs the package {0} ({1}): pip install {0}, or set it to "none"'


@dataclass(frozen=True)
class Scan:
    """A JSONL file as found: `rows` and their raw `lines` in file order; torn: the last line was not a whole row."""

    rows: list[Row]
    lines: list[bytes]
    torn: bool


def scan(path: Path) -> Scan:
    """Reads a JSONL file of objects. A last line that is not a whole row is left out and reported as `torn`.

    Raises UserError where the file is missing, or where a line before the last is not a JSON object: a crash tears
    only the end of a file, anything else means that the file was edited or damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the folder of a run that has written it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if lines[-1] == b"":
        lines.pop()
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines):
            return Scan(rows, lines[:-1], torn=True)
        else:
            raise UserError(
                f"{path}, line {number} is not a JSON object: mend or delete that line (only a last line can be torn "
                "by a crash)"
            )
    return Scan(rows, lines, torn=False)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; a torn last line is left out (see scan)."""
    return scan(path).rows


class MetricsLog:
    """Appends rows to a JSONL file, one flush a row; serves metrics.jsonl and samples.jsonl alike.

    Numbers that are not finite are written as NaN and Infinity, which Python, pandas and jq read back: a loss that
    became NaN has to be seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, row: Row) -> None:
        """Appends one row. Raises UserError where the file ends in a torn line, which a new row would be glued to."""
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> int:
        """Drops the rows with a "step" greater than `step`, and a torn last line; returns how many lines went.

        The rows that stay keep their bytes. The file is replaced in one move, so a crash leaves the old or the new
        one, never a part. A missing file is an empty one. Raises UserError as scan does, and for a row without "step".
        """
        self.close()
        if not self.path.exists():
            return 0
        found = scan(self.path)
        kept = [line + b"\n" for at, line in zip(self._steps(found), found.lines, strict=True) if at <= step]
        write_whole(self.path, b"".join(kept), synced=True)
        return len(found.lines) - len(kept) + found.torn

    def steps(self) -> list[int]:
        """The "step" of every whole row. Raises UserError as truncate_after() does."""
        return self._steps(scan(self.path)) if self.path.exists() else []

    def _steps(self, found: Scan) -> list[int]:
        for number, row in enumerate(found.rows, 1):
            if type(row.get("step")) is not int:
                raise UserError(f'{self.path}, line {number} has no whole number "step": mend or delete that line')
        return [row["step"] for row in found.rows]

    def sync(self) -> None:
        """Returns when every row is on the disk."""
        if self.path.exists():
            sync(self.path)

    def close(self) -> None:
        """Closes the file; the next write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    raise UserError(
                        f'{self.path} ends in a torn line: go on with run.resume = "auto", which drops it, or use '
                        "a new run folder"
                    )
        # A lone surrogate in a text becomes its JSON escape, which reads back as it was.
        return self.path.open("a", encoding="utf-8", errors="backslashreplace")


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, row: Row, step: int) -> None:
        """Takes one row of metrics.jsonl."""

    def close(self) -> None:
        """Sends what is left. No call may follow."""


class NoTracker:
    """tracking.tracker = "none"."""

    def log(self, row: Row, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in <run folder>/tensorboard, one scalar a key; stages are not scalars and stay in metrics.jsonl."""

    def __init__(self, run_dir: Path, config: Row, resume_step: int) -> None:
        writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._writer = writer(
            str(run_dir / "tensorboard"), flush_secs=10, purge_step=resume_step + 1 if resume_step else None
        )
        self._writer.add_text("config", "```json\n" + json.dumps(config, indent=2, ensure_ascii=False) + "\n```")

    def log(self, row: Row, step: int) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases; WANDB_MODE, WANDB_ENTITY and the other variables of wandb count as always."""

    def __init__(self, project: str, name: str, run_dir: Path, config: Row) -> None:
        wandb = _package("wandb")
        run_id = _identity(run_dir, "wandb", lambda: secrets.token_hex(4))
        self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=str(run_dir), config=config)
        # wandb's own step only ever grows: the rows that a resumed run computes again would be thrown away.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row, step: int) -> None:
        self._run.log({**row, "step": step})

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """trackio, on this machine by default; TRACKIO_DIR and TRACKIO_SPACE_ID count as always."""

    def __init__(self, project: str, name: str, run_dir: Path, config: Row) -> None:
        trackio = _package("trackio")
        # trackio resumes the newest run of a name, so the name has to be this run's alone.
        unique = _identity(run_dir, "trackio", lambda: f"{name}-{secrets.token_hex(2)}")
        self._run = trackio.init(project=project, name=unique, config=config, resume="allow", embed=False)

    def log(self, row: Row, step: int) -> None:
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """MLflow at MLFLOW_TRACKING_URI; without it in <run folder>/mlflow.db (`mlflow ui --backend-store-uri ..`)."""

    def __init__(self, project: str, name: str, run_dir: Path, config: Row) -> None:
        self._mlflow = _package("mlflow")
        own_store = not os.environ.get("MLFLOW_TRACKING_URI")
        if own_store:
            self._mlflow.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
        experiment = self._mlflow.get_experiment_by_name(project)
        if experiment is None:
            place = (run_dir / "mlflow-artifacts").resolve().as_uri() if own_store else None
            experiment_id = self._mlflow.create_experiment(project, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        marker = run_dir / "tracker.json"
        known = json.loads(marker.read_text(encoding="utf-8")).get("mlflow") if marker.exists() else None
        run = self._mlflow.start_run(run_id=known, run_name=name, experiment_id=experiment_id)
        if known is None:
            _identity(run_dir, "mlflow", lambda: run.info.run_id)
            self._mlflow.log_dict(config, "config.json")
            self._mlflow.log_params({key: value for key, value in _flatten(config) if len(str(value)) <= 6000})

    def log(self, row: Row, step: int) -> None:
        self._mlflow.log_metrics(_numbers(row), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Guarded:
    """Switches a tracker off at its first error, and says so once."""

    def __init__(self, kind: str, tracker: Tracker, log: Callable[[str], None]) -> None:
        self._kind, self._tracker, self._report = kind, tracker, log
        self._on = True

    def log(self, row: Row, step: int) -> None:
        if self._on:
            self._attempt(lambda: self._tracker.log(row, step), f"at step {step}")

    def close(self) -> None:
        if self._on:
            self._attempt(self._tracker.close, "while closing")
            self._on = False

    def _attempt(self, call: Callable[[], None], when: str) -> None:
        try:
            call()
        except Exception as error:
            self._on = False
            self._report(
                f"The tracker {self._kind} failed {when} ({type(error).__name__}: {error}) and is switched off; the "
                "run goes on, and metrics.jsonl holds every figure."
            )


def make_tracker(
    kind: str,
    project: str,
    run_name: str,
    run_dir: Path,
    config_dict: Row,
    *,
    resume_step: int = 0,
    log: Callable[[str], None] = logger.warning,
) -> Tracker:
    """The tracker of that kind: none, tensorboard, wandb, trackio or mlflow.

    resume_step: the last step that is kept when a run goes on; 0 for a new run. A resumed run goes on in the same
    run of wandb, trackio and mlflow, whose id is kept in <run folder>/tracker.json.
    log: receives one sentence when the tracker fails after its start; it is switched off then.
    Raises UserError for an unknown kind, a package that is missing, and a tracker that cannot start.
    """
    starts: dict[str, Callable[[], Tracker]] = {
        "none": NoTracker,
        "tensorboard": lambda: TensorBoardTracker(run_dir, config_dict, resume_step),
        "wandb": lambda: WandbTracker(project, run_name, run_dir, config_dict),
        "trackio": lambda: TrackioTracker(project, run_name, run_dir, config_dict),
        "mlflow": lambda: MlflowTracker(project, run_name, run_dir, config_dict),
    }
    if kind not in starts:
        raise UserError(f'tracking.tracker = "{kind}" is unknown: use one of {", ".join(starts)}')
    try:
        tracker = starts[kind]()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'tracking.tracker = "{kind}" cannot start ({type(error).__name__}: {error}): mend that, or use "none"'
        ) from error
    return tracker if kind == "none" else _Guarded(kind, tracker, log)


def check_tracker(kind: str) -> None:
    """Raises UserError where the package of a tracker is not installed. Loads none."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise UserError(_MISSING.format(kind, "it is not installed"))


def _package(name: str, module: str | None = None) -> Any:
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise UserError(_MISSING.format(name, error)) from error


def _identity(run_dir: Path, kind: str, make: Callable[[], str]) -> str:
    """The id under which the tracker knows this run: kept in the run folder, made on the first start."""
    path = run_dir / "tracker.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kind not in known:
        known[kind] = make()
        write_whole(path, json.dumps(known) + "\n")
    return known[kind]


def _numbers(row: Row) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}


def _flatten(config: Row, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
