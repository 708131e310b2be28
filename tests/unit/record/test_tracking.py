"""The record of a run (JSONL) and the trackers on top of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.record.tracking import MetricsLog, make_tracker, read_rows, scan


def written(path: Path, steps: int) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.write({"stage": "gad", "step": step, "reward/mean": step / 3})
    return log


def test_every_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl", 2)
    assert [row["reward/mean"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1 / 3, 2 / 3]


def test_text_and_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    row = {"step": 1, "prompt": "naïve 日本語 👩‍🔬\n\u2028 \ud83d lone", "loss": math.inf}
    MetricsLog(tmp_path / "samples.jsonl").write(row)
    MetricsLog(tmp_path / "samples.jsonl").write({"step": 2, "loss": math.nan})
    first, second = read_rows(tmp_path / "samples.jsonl")
    assert first == row
    assert math.isnan(second["loss"])


def test_truncate_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = written(path, 5)
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"stage": "gad", "step": 6, "rew')
    assert log.truncate_after(3) == 3  # steps 4 and 5, and the torn line
    assert path.read_bytes() == b"".join(before[:3])
    log.write({"step": 4})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_of_a_missing_file(tmp_path: Path) -> None:
    assert MetricsLog(tmp_path / "samples.jsonl").truncate_after(3) == 0
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_whole_row_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert MetricsLog(path).truncate_after(9) == 0
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("bad", [b'{"step": 2', b"7", b"", b"[" * 9999, b'{"step": 2, "x": "\xff"}'])
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 "):
        MetricsLog(path).truncate_after(1)
    assert path.read_bytes() == before


def test_rows_without_a_step_cannot_be_truncated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"stage": "gad"}\n')
    with pytest.raises(UserError, match='line 2 has no whole number "step"'):
        MetricsLog(path).truncate_after(1)


def test_a_torn_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    assert scan(path).torn
    with pytest.raises(UserError, match="torn"):
        MetricsLog(path).write({"step": 2})


def test_reading_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_rows(tmp_path / "metrics.jsonl")


def tracker_of(kind: str, run_dir: Path, **options: object):  # type: ignore[no-untyped-def]
    return make_tracker(kind, "gadcore", "gad", run_dir, {"run": {"name": "gad"}}, **options)  # type: ignore[arg-type]


def test_tensorboard_holds_every_number_and_the_resumed_ones_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = tracker_of("tensorboard", tmp_path, resume_step=resume_step)
        for step in steps:
            tracker.log({"stage": "gad", "step": step, "reward/mean": step + 10.0 * (resume_step > 0)}, step)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    assert events.Tags()["scalars"] == ["reward/mean"]


@pytest.mark.parametrize("kind", ["wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=f"pip install {kind}"):
        tracker_of(kind, tmp_path)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none, tensorboard, wandb, trackio, mlflow"):
        tracker_of("excel", tmp_path)


class FakeWandb:
    """Stands for the wandb package: remembers its runs, and fails where it is asked to."""

    def __init__(self, fail_at: int | None = None, refuse: bool = False) -> None:
        self.fail_at, self.refuse = fail_at, refuse
        self.ids: list[str] = []
        self.rows: list[dict[str, object]] = []

    def init(self, **options: object) -> FakeWandb:
        if self.refuse:
            raise RuntimeError("api key not configured")
        self.ids.append(str(options["id"]))
        return self

    def define_metric(self, name: str, step_metric: str) -> None: ...

    def log(self, row: dict[str, object]) -> None:
        if row["step"] == self.fail_at:
            raise ConnectionError("gone")
        self.rows.append(row)

    def finish(self) -> None: ...


def test_a_tracker_that_fails_later_is_told_once_and_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb(fail_at=2)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logged: list[str] = []
    tracker = tracker_of("wandb", tmp_path, log=logged.append)
    for step in (1, 2, 3):
        tracker.log({"step": step}, step)
    tracker.close()
    assert [row["step"] for row in fake.rows] == [1]
    assert len(logged) == 1
    assert "wandb failed at step 2 (ConnectionError: gone) and is switched off" in logged[0]


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuse=True))
    with pytest.raises(UserError, match="cannot start .*api key not configured"):
        tracker_of("wandb", tmp_path)


def test_a_resumed_run_is_the_same_run_to_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker_of("wandb", tmp_path)
    tracker_of("wandb", tmp_path, resume_step=4)
    other = tmp_path / "other"
    other.mkdir()
    tracker_of("wandb", other)
    assert fake.ids[0] == fake.ids[1] != fake.ids[2]
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"wandb": fake.ids[0]}


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = tracker_of("none", tmp_path)
    tracker.log({"step": 1}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []
