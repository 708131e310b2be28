"""The order of `bench methods`, what a run at equal seconds is made of, and when a row that is kept is made again."""

from __future__ import annotations

import json

import pytest

from bench.methods import suite, training
from gadcore.config import loading
from gadcore.config.settings import Config


class Runs:
    """Runs that take no time: a step of GAD lasts 9 s, any other 1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.steps: dict[str, dict[str, int]] = {}
        monkeypatch.setattr(training, "train", self.train)
        monkeypatch.setattr(training, "steps_of", lambda folder: self.steps[folder.name])
        monkeypatch.setattr(training, "seconds_of", self.seconds)
        monkeypatch.setattr(training, "measure", lambda *given: {"held_out": {"style": [0.5]}, "elsewhere": {}})
        monkeypatch.setattr(training, "taught", lambda place: {"held_out": {"style": [1.0]}})

    def train(self, place, name, command, settings, seed):
        self.made.append(name)
        folder = place.folder / "trained" / name
        (folder / "student").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("")
        found = {key.split(".")[1].removesuffix("_steps"): n for key, n in settings.items() if key.endswith("_steps")}
        self.steps[name] = found
        return folder

    def seconds(self, folder):
        return {stage: n * (9.0 if stage == "gad" else 1.0) for stage, n in self.steps[folder.name].items()}


@pytest.fixture
def runs(monkeypatch) -> Runs:
    return Runs(monkeypatch)


def rows(tmp_path, **options) -> list[suite.Row]:
    return list(suite.run(False, data="manners", work=tmp_path, **{"methods": ["seqkd", "gad_plateau"], **options}))


def test_gad_comes_first_and_the_others_last_as_long_at_equal_seconds(tmp_path, runs) -> None:
    found = rows(tmp_path, methods=["soda", "gad", "seqkd", "gad_plateau", "gad_frozen"], seeds=1)
    keys = [(row["method"], row["budget"]) for row in found]
    assert keys[:3] == [("start", "data"), ("gad_plateau", "data"), ("gad_plateau", "seconds")] and len(keys) == 11
    assert runs.made[0] == "gad_plateau-data-0" and "gad_plateau-seconds-0" not in runs.made
    by_key = dict(zip(keys, found, strict=True))
    steps = {method: by_key[method, "data"]["steps"] for method, _ in keys[1:]}
    assert {sum(each.values()) for each in steps.values()} == {700}
    target = sum(by_key["gad_plateau", "data"]["seconds"].values())
    assert target == 400 + 9 * 300
    assert by_key["seqkd", "seconds"]["steps"] == {"seqkd": 3100}
    for method in steps:
        assert sum(by_key[method, "seconds"]["seconds"].values()) == target


def test_rows_are_made_once_and_their_runs_leave_only_their_records(tmp_path, runs) -> None:
    first = rows(tmp_path, seeds=2)
    made = list(runs.made)
    assert len(first) == 9 and len(made) == len(set(made)) == 6
    assert rows(tmp_path, seeds=2) == first and runs.made == made
    left = {path.name for path in (tmp_path / "manners/trained/seqkd-data-1").iterdir()}
    assert left == {"metrics.jsonl"}
    assert [*map(suite.key, first[:2])] == [("manners", "start", "data", 0), ("manners", "gad_plateau", "data", 0)]
    assert json.dumps(first[1]).count(str(tmp_path)) == 0


def test_a_row_of_other_settings_is_made_anew(tmp_path, runs) -> None:
    rows(tmp_path, seeds=1, budgets=["data"])
    made = list(runs.made)
    again = rows(tmp_path, seeds=1, budgets=["data"], settings=["--student.lr=1e-3"])
    assert runs.made == made * 2 and again[1]["given"] == ["--student.lr=1e-3"]


def test_what_a_recipe_leaves_open_has_gadcores_defaults(tmp_path, monkeypatch) -> None:
    """Not those of the default job, whose preset a command line without a file means."""
    asked: list[list[str]] = []
    monkeypatch.setattr(training, "_run", lambda given, what: asked.append(list(given)))
    place = training.Place(tmp_path, "house", "m", "m", 1, [], {})
    training.train(place, "soda-data-0", "soda", {"student.soda_lr": 1e-5}, seed=3)
    (command, config, *others) = asked[0]
    assert command == "soda" and loading.load([config]) == Config()
    assert loading.load([config, *others]).run.seed == 3


def test_values_are_written_as_a_line_a_column() -> None:
    assert suite.numbers("0.5 1 1e-05") == [0.5, 1.0, 1e-5]
