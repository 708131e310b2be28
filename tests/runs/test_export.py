"""`export`, and checkpoints as models of `eval`, on a tiny run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gadcore import Discriminator
from gadcore import run as command
from gadcore.checkpoint import store
from gadcore.evaluate.command import main as evaluate
from gadcore.files import LOCK, held
from gadcore.record.reading import read_json
from tests.support.runs import run, tiny_arguments

# Of 3 + 4 steps: every second one, and the ends of the stages.
STEPS = "2, 3, 4, 6, 7"


@pytest.fixture(scope="module")
def trained(module_folder: Path) -> Path:
    """A finished run: its folder."""
    done = run([*tiny_arguments(module_folder), "--run.dir", "run", "--checkpoint.keep", "9"], module_folder)
    assert done.returncode == 0, done.stderr
    return module_folder / "run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The same run, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def export(*arguments: object) -> int:
    return command.main(["export", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    assert export(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("which", ["student", "discriminator"])
def test_the_last_checkpoint_is_the_runs_own_model_to_the_bit(trained, tmp_path, which) -> None:
    assert export(trained, "--out", tmp_path / "deep/out", "--model", which) == 0
    theirs = {file.name for file in (trained / which).iterdir()}
    assert {file.name for file in (tmp_path / "deep/out").iterdir()} == theirs | {"README.md"}
    assert "tokenizer.json" in theirs
    for name in theirs:
        assert (tmp_path / "deep/out" / name).read_bytes() == (trained / which / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_earlier_checkpoint_loads_in_transformers_with_its_own_weights(trained, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    assert export(trained, "--step", 4, "--out", tmp_path / "out") == 0
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    saved = load_file(trained / "checkpoints/step-000004/student.safetensors")
    assert {name: p.tolist() for name, p in model.named_parameters()} == {n: t.tolist() for n, t in saved.items()}
    assert (tmp_path / "out/model.safetensors").read_bytes() != (trained / "student/model.safetensors").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert export(trained, "--step", "step-000004", "--out", tmp_path / "judge", "--model", "discriminator") == 0
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    head = load_file(trained / "checkpoints/step-000004/discriminator.safetensors")["score.weight"]
    assert judge.score.weight.tolist() == head.tolist()


def test_everyone_who_may_read_the_config_may_read_the_weights(trained, tmp_path) -> None:
    assert export(trained, "--out", tmp_path / "out") == 0
    for folder in (tmp_path / "out", trained / "student", trained / "discriminator"):
        assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_another_export_into_the_same_folder_is_refused_and_what_others_made_stays(trained, tmp_path, capsys) -> None:
    for name in ("out.partial", ".tmp-out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "note").write_text("mine")
    with held(tmp_path / f"{LOCK}-out", "x"):
        assert "out is in use by process" in refused(capsys, trained, "--out", tmp_path / "out")
    assert export(trained, "--out", tmp_path / "out") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial", ".tmp-out"}
    assert (tmp_path / "out.partial/note").exists() and (tmp_path / ".tmp-out/note").exists()


def test_bad_arguments_are_named(trained, tmp_path, capsys, monkeypatch) -> None:
    assert "'last' is no step: write a number" in refused(capsys, trained, "--step", "last", "--out", tmp_path / "x")
    assert f"has checkpoints of the steps {STEPS}" in refused(capsys, trained, "--step", 5, "--out", tmp_path / "x")
    assert "is no run folder" in refused(capsys, tmp_path, "--out", tmp_path / "x")
    assert "exists and is not empty: choose another folder" in refused(capsys, trained, "--out", trained)
    assert "--out" in refused(capsys, trained)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", tmp_path / "here"):
        assert "is the folder that you are in" in refused(capsys, trained, "--out", name)
    assert not (tmp_path / "x").exists()


def test_what_a_run_does_not_have_is_named(copied, tmp_path, capsys) -> None:
    for path in (copied / "checkpoints").glob("step-*"):
        (path / "discriminator.safetensors").unlink()
        manifest = json.loads((path / store.MANIFEST).read_text())
        del manifest["files"]["discriminator.safetensors"]
        (path / store.MANIFEST).write_text(json.dumps(manifest))
    told = refused(capsys, copied, "--out", tmp_path / "x", "--model", "discriminator")
    assert "has no discriminator: the baselines train none" in told
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoints: set checkpoint.every" in refused(capsys, copied, "--out", tmp_path / "x")


def test_a_damaged_checkpoint_is_not_exported(copied, tmp_path, capsys) -> None:
    file = copied / "checkpoints/step-000007/student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "student.safetensors is damaged" in refused(capsys, copied, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["student"].pop("model.norm.weight"), "its model.norm.weight is missing, the model's [64]"),
        (lambda t: t["student"].update(more=t["rng"]["cpu"]), "its more is [5056], the model's missing"),
    ],
)
def test_weights_of_another_model_are_refused(copied, tmp_path, capsys, change, message) -> None:
    saved = store.load(copied / "checkpoints/step-000007")
    change(saved.tensors)
    store.save(copied / "checkpoints", 8, saved.tensors, saved.state, keep=9)
    told = refused(capsys, copied, "--out", tmp_path / "x")
    assert message in told and "keep the student.model of the run" in told


def evaluated(out: Path, models: str, rows: Path, *more: str) -> dict:
    limits = ("--data.max_prompt_tokens=96", "--data.max_response_tokens=6", "--sampling.engine=hf")
    fresh = ("--fresh.steps=2", "--fresh.batch_size=4", "--fresh.lr=1e-3", "--eval.resamples=50")
    sets = (f"--eval.models={models}", f"--eval.in_domain=rows={rows}", f"--eval.out={out}")
    assert evaluate([*limits, *fresh, *sets, *more]) == 0
    return read_json(out / "evaluation.json")


def test_eval_takes_a_checkpoint_as_a_model(trained, tmp_path, monkeypatch) -> None:
    """With the figures of the run's own model where it is the last, in the fresh test's discriminator too."""
    rows, saved = trained.parent / "rows.jsonl", trained / "checkpoints"
    found = evaluated(tmp_path / "out", f"last={saved}/step-000007,early={saved}/step-000002", rows)
    sets = evaluated(tmp_path / "other", f"last={trained}", rows)["sets"]
    assert found["sets"]["rows"]["results"]["last"] == sets["rows"]["results"]["last"]
    texts = [(tmp_path / f"out/rows/{name}.jsonl").read_text() for name in ("last", "early")]
    assert texts[0] != texts[1]
    assert not list((tmp_path / "out").glob(".gadcore-*"))

    monkeypatch.setattr("gadcore.evaluate.sampling.make_engine", lambda *_: pytest.fail("sampled again"))
    assert evaluated(tmp_path / "out", f"last={saved}/step-000007,early={saved}/step-000002", rows) == found


def test_eval_refuses_a_checkpoint_without_its_run_before_it_samples(trained, tmp_path, capsys) -> None:
    alone = shutil.copytree(trained / "checkpoints/step-000007", tmp_path / "step-000007")
    model, rows = trained.parent / "model", trained.parent / "rows.jsonl"
    settings = [f"--eval.models=before={model},alone={alone}", f"--eval.in_domain=rows={rows}", "--eval.out=x"]
    assert command.main(["eval", *settings]) == 2
    assert "lies in no run folder" in capsys.readouterr().err


def test_the_card_says_where_the_model_comes_from(trained, tmp_path) -> None:
    assert export(trained, "--out", tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model is None
    assert "trained for 3 steps of warmup, 4 steps of gad" in card.text and "`schedule.batch_size` | `4`" in card.text
    # The last evaluation is made after the last checkpoint, and belongs to it all the same.
    assert "On 4 held-out prompts" in card.text and "| | before | after warmup | after gad |" in card.text
    assert export(trained, "--out", tmp_path / "early", "--step", "4") == 0
    assert "after gad" not in (tmp_path / "early/README.md").read_text()
    assert export(trained, "--out", tmp_path / "d", "--model", "discriminator") == 0
    card = ModelCard.load(tmp_path / "d" / "README.md")
    assert "held-out prompts" not in card.text and card.data.pipeline_tag == "text-classification"
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"sample, in the last step | {last['discriminator/accuracy']:.3f} |" in card.text


def test_the_program_of_a_discriminators_card_gives_its_scores(trained, tmp_path, capsys) -> None:
    assert export(trained, "--out", tmp_path / "d", "--model", "discriminator") == 0
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "d/README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    exec(program.replace("PATH OR HUB ID OF THIS MODEL", str(tmp_path / "d")), {})
    found = [float(line) for line in capsys.readouterr().out.split()]
    d = Discriminator.load(str(tmp_path / "d"), device="cpu")
    scores = d.score([d.group("Name a city.", "Paris.", ["Zero degrees", "Paris is a"], [True, False])])
    assert found == pytest.approx([scores.teacher_scores[0], *scores.rewards[0]], abs=1e-5)


def test_weights_of_another_dtype(trained, tmp_path) -> None:
    assert export(trained, "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    own, cast = (load_file(folder / "model.safetensors") for folder in (trained / "student", tmp_path / "out"))
    assert own.keys() == cast.keys() and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(cast[name], own[name].bfloat16()) for name in own)


def test_push_uploads_what_was_written(trained, tmp_path, monkeypatch, capsys) -> None:
    calls: list[tuple[str, object]] = []

    def create(self, name, *, private, exist_ok):
        calls.append((name, private))
        return f"https://hub/{name}"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, *, folder_path, repo_id: calls.append((repo_id, folder_path))
    )
    assert export(trained, "--out", tmp_path / "out", "--push", "me/student") == 0
    assert calls == [("me/student", True), ("me/student", tmp_path / "out")]
    assert capsys.readouterr().out.endswith("https://hub/me/student\n")
    monkeypatch.undo()
    # Without a network, and without a right name.
    for name in ("me/student", "a/b/c"):
        said = refused(capsys, trained, "--out", tmp_path / name.replace("/", "-"), "--push", name)
        assert f"is written, but --push {name} failed" in said
