"""What a run promises to come out as, and the tiles with which it keeps that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gadcore.config.loading import load
from gadcore.errors import UserError
from gadcore.record.run_folder import TILES, RunFolder
from gadcore.train import build
from gadcore.train.records import RunRecords
from gadcore.train.reproducible import reproducible


def test_on_a_cpu_the_seed_decides() -> None:
    said = reproducible(load([]), "cpu")
    assert said["resumed"] and said["new_run"]


@pytest.mark.parametrize(
    ("rollout", "resumed", "word"),
    [
        ({"engine": "vllm", "batch_invariant": False}, False, "rollout.batch_invariant"),
        ({"engine": "vllm", "batch_invariant": True}, True, "tiles.json"),
        ({"engine": "hf"}, True, "tiles.json"),
    ],
)
def test_on_a_gpu_it_says_what_does_not_hold_and_why(rollout: dict[str, Any], resumed: bool, word: str) -> None:
    config: Any = SimpleNamespace(rollout=SimpleNamespace(**rollout))
    said = reproducible(config, "cuda")
    assert said["resumed"] == resumed and not said["new_run"] and word in " ".join(said["why"])


class Silent:
    """Stands in for a view and a tracker."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def test_a_step_is_recorded_after_its_tiles(tmp_path: Path) -> None:
    folder, tiles = RunFolder(tmp_path), {"capability": 90, "kernels": {}}
    there = []

    def chosen() -> dict[str, Any]:
        there.append(folder.metrics.path.exists())
        return tiles

    silent: Any = Silent()
    records = RunRecords(folder, silent, silent, tiles=chosen)
    records.step({"stage": "gad", "step": 1, "stage_step": 1, "stage_steps": 2}, {"time/total": 1.0})
    assert folder.kept_tiles() == tiles and there == [False] and folder.metrics.path.exists()


def test_a_resumed_run_takes_the_tiles_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, taken = RunFolder(tmp_path), []

    def use(tiles: dict[str, Any]) -> list[str]:
        taken.append(tiles)
        return ["the tiles were chosen on a GPU of sm_90, this one is of sm_80"]

    monkeypatch.setattr(build, "use_tiles", use)
    folder.keep_tiles({"capability": 90, "kernels": {"a.b": []}})
    (note,) = build._resumed_tiles(folder)
    assert taken == [{"capability": 90, "kernels": {"a.b": []}}] and "sm_80" in note and "last bits" in note


def test_tiles_of_another_make_are_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / TILES).write_text('{"something": "else"}')
    with pytest.raises(UserError, match="is not what a run writes .* put it back, or delete it"):
        build._resumed_tiles(folder)
