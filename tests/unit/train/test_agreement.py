"""The mesh that a job has: what was chosen, what a resumed run had, what torchrun has started."""

from __future__ import annotations

import pytest

from gadcore.config.distributed import DistributedSettings
from gadcore.config.loading import load
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.run import _restarted
from gadcore.train.agreement import notes_of, resumed_elsewhere, settled


def mesh(processes: int, *arguments: str, saved: DistributedSettings | None = None) -> tuple[int, int, list[str]]:
    config = load(arguments)
    if saved is not None:
        config = config.model_copy(update={"distributed": saved})
    found, notes = settled(config, processes)
    return found.distributed.shard, found.distributed.replicate, notes


def saved(shard: int, replicate: int) -> DistributedSettings:
    """As a resumed run has them: nobody chose them this time."""
    settings = DistributedSettings(shard=shard, replicate=replicate)
    settings.model_fields_set.clear()
    return settings


def test_models_are_cut_over_all_processes_or_those_of_a_copy() -> None:
    assert mesh(1) == (0, 1, [])
    assert mesh(8) == (8, 1, [])
    assert mesh(16, "--distributed.replicate", "2") == (8, 2, [])
    assert mesh(16, "--distributed.replicate", "2", "--distributed.shard", "8") == (8, 2, [])
    # Alone nothing is read.
    assert mesh(1, "--distributed.replicate", "2") == (0, 1, [])


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [(4, ("--distributed.shard", "8")), (6, ("--distributed.replicate", "4")), (2, ("--distributed.replicate", "4"))],
)
def test_a_mesh_of_other_processes_is_refused(processes: int, arguments: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"are not {processes} processes, which torchrun has started: start shard x"):
        mesh(processes, *arguments)


def test_a_resumed_run_gives_way_to_what_was_started() -> None:
    assert mesh(8, saved=saved(8, 1)) == (8, 1, [])
    shard, replicate, (note,) = mesh(2, saved=saved(8, 2))
    assert (shard, replicate) == (2, 1) and "8 x 2 is not the number of processes" in note
    assert mesh(1, saved=saved(8, 2)) == (0, 1, [])


def test_what_is_told_of_a_run_of_several_processes(monkeypatch) -> None:
    config = load(["--schedule.batch_size", "2"])
    assert notes_of(config, ALONE) == [] and notes_of(config, World(0, 2)) == []
    (note,) = notes_of(config, World(1, 3))
    assert note.startswith("schedule.batch_size = 2 prompts are fewer than the 3 processes")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    (note,) = notes_of(config, World(0, 2))
    assert "--run.dir" in note
    assert notes_of(load(["--run.dir", "x"]), World(0, 2)) == []
    assert resumed_elsewhere(2, World(0, 2)) == []
    (note,) = resumed_elsewhere(4, ALONE)
    assert note.startswith("the checkpoint is one of 4 processes, the run goes on with 1 process: ")


def test_a_job_that_is_started_anew_goes_on(tmp_path, monkeypatch) -> None:
    named = ["--run.dir", str(tmp_path)]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _restarted(named) == [] and _restarted([]) == []
    (tmp_path / "config.toml").write_text("")
    assert _restarted(named) == ["--run.resume", "auto"] and _restarted([]) == []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert _restarted(named) == []
