"""The folder of a run: what lies where, and who may write into it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcore.config.loading import dump
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.files import free_name, replace_link, write_jsonl, write_whole
from gadcore.record.tracking import MetricsLog

RUNS = Path("runs")
LATEST = RUNS / "latest"


@dataclass(frozen=True)
class RunFolder:
    """config.toml, metrics.jsonl, samples.jsonl, evaluations/, checkpoints/, reference/, student/, discriminator/,
    summary.json, report.html and, where it was asked for, trace.json of one run."""

    path: Path
    metrics: MetricsLog
    samples: MetricsLog

    @classmethod
    def _at(cls, path: Path) -> RunFolder:
        return cls(path, MetricsLog(path / "metrics.jsonl"), MetricsLog(path / "samples.jsonl"))

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """A new folder with the resolved config in it; a folder that holds another run is refused."""
        path = Path(config.run.dir) if config.run.dir else _fresh(config.run.name)
        if (path / "config.toml").exists():
            raise UserError(
                f"{path} already holds another run: choose another run.dir, or go on with it by --resume auto"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{error.filename} is a file where a folder is needed: choose another run.dir") from error
        folder = cls._at(path)
        folder._write("config.toml", dump(config.started_new()))
        _point_latest(path)
        return folder

    @classmethod
    def existing(cls, directory: str | None) -> RunFolder:
        """The folder of a run to go on with: the one named, or the newest."""
        path = Path(directory) if directory else LATEST.resolve()
        if not (path / "config.toml").is_file():
            raise UserError(
                f"there is no run to resume in {path}: give its folder by --run.dir, or leave --resume away"
            )
        return cls._at(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def reference(self) -> Path:
        """The saved reference policy of the GAD stage."""
        return self.path / "reference"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    def keep_config(self, config: Config, step: int) -> None:
        """Writes the settings that a resumed run goes on with; the ones before are kept as config-<step>.toml."""
        current, kept = self.path / "config.toml", dump(config.started_new())
        if current.read_text(encoding="utf-8") != kept:
            current.replace(self.path / f"config-{step:06d}.toml")
            self._write("config.toml", kept)
        _point_latest(self.path)

    def write_evaluation(self, name: str, rows: list[dict[str, Any]]) -> None:
        write_jsonl(self.path / "evaluations" / f"{name}.jsonl", rows)

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        # A tokenizer can produce a lone half of a surrogate pair.
        write_whole(self.path / name, text, errors="backslashreplace")


def _fresh(name: str) -> Path:
    return free_name(RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _point_latest(path: Path) -> None:
    if LATEST.exists() and not LATEST.is_symlink():
        raise UserError(f"{LATEST} is in the way: it should be a link to the newest run, move it elsewhere")
    replace_link(LATEST, path)
