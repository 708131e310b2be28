"""Runs whose student and discriminator are adapters on one base: resumed to the bit, small on disk, exported."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gadcore.run import main
from tests.support.runs import ROOT, assert_same_run, run, tiny_arguments
from tests.support.tiny import save_tiny

ADAPTERS = "--student.adapter lora --student.adapter_rank 4 --discriminator.adapter lora --discriminator.adapter_rank 8"


def arguments(folder: Path, engine: str = "hf") -> list[str]:
    return [*tiny_arguments(folder, engine), *ADAPTERS.split()]


@pytest.fixture(scope="module")
def whole(module_folder: Path) -> Path:
    done = run([*arguments(module_folder), "--run.dir", "run"], module_folder)
    assert done.returncode == 0, done.stderr
    return module_folder


def killed_then_resumed(whole: Path, folder: Path, moment: str, count: int, engine: str, *more: str) -> None:
    killer = [sys.executable, str(ROOT / "tests/support/killed_run.py"), moment, str(count), "--"]
    killed = run([*arguments(whole, engine), *more, "--run.dir", str(folder / "run")], folder, command=killer)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(["--run.dir", "run", "--resume", "auto"], folder)
    assert resumed.returncode == 0, resumed.stderr


def test_sigkill_and_resume(whole, tmp_path) -> None:
    """Inside the GAD stage, so that the reference comes back as well."""
    killed_then_resumed(whole, tmp_path, "update", 6, "hf")
    assert_same_run(tmp_path / "run", whole / "run")


@pytest.mark.by_hand
def test_sigkill_and_resume_with_vllm(tmp_path) -> None:
    pytest.importorskip("vllm")
    done = run([*arguments(tmp_path, "vllm"), "--run.dir", "whole"], tmp_path)
    assert done.returncode == 0, done.stderr
    for moment, count in (("rollout", 7), ("update", 6)):
        folder = tmp_path / moment
        folder.mkdir()
        killed_then_resumed(tmp_path, folder, moment, count, "vllm")
        assert_same_run(folder / "run", tmp_path / "whole")


@pytest.mark.by_hand
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_base_in_few_bits(tmp_path, capsys, engine) -> None:
    """Resumed to the bit, exported as it was saved, and refused where the base is kept in something else."""
    pytest.importorskip(engine.replace("hf", "torch"))
    more = ("--student.adapter_base", "nf4", "--discriminator.adapter_base", "int8")
    done = run([*arguments(tmp_path, engine), *more, "--run.dir", "whole"], tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "again").mkdir()
    killed_then_resumed(tmp_path, tmp_path / "again", "update", 6, engine, *more)
    assert_same_run(tmp_path / "again/run", tmp_path / "whole")
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "out")]) == 0
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", tmp_path / "whole/student"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # What the bits say, with the adapter: no longer the model's own weights, and loaded as any model is.
    base, student = (AutoModelForCausalLM.from_pretrained(tmp_path / p) for p in ("model", "whole/student"))
    far = [(a - b).norm() / a.norm() for a, b in zip(base.parameters(), student.parameters(), strict=True)]
    assert 0.05 < max(far) < 0.3
    (tmp_path / "whole/summary.json").unlink()
    last = newest(tmp_path / "whole").name
    changed = ["--run.dir", str(tmp_path / "whole"), "--resume", last, "--student.adapter_base", "none"]
    assert main(changed) != 0
    assert "on a base that is kept in nf4" in " ".join(capsys.readouterr().err.split())


def newest(run_folder: Path) -> Path:
    return max((run_folder / "checkpoints").glob("step-*"))


def test_a_checkpoint_holds_no_weight_of_the_base(whole) -> None:
    saved, reference = newest(whole / "run"), max((whole / "run/reference").glob("step-*"))
    student, scorer = (load_file(saved / f"{name}.safetensors") for name in ("student", "discriminator"))
    assert len(student) == 28 and all(name.endswith((".lora_A", ".lora_B")) for name in student)
    assert scorer.keys() == student.keys() | {"score.weight"}
    assert load_file(reference / "reference.safetensors").keys() == student.keys()
    moments = load_file(saved / "student-optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == student.keys()
    bases = json.loads((saved / "state.json").read_text())["bases"]
    assert bases["student"]["base"] == str(whole / "model") and bases["discriminator"]["rank"] == 8


def test_the_base_is_one_holding(whole) -> None:
    states = json.loads((whole / "run/summary.json").read_text())["memory"]["states"]
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    expected = sum(p.nbytes for p in model.parameters())
    assert {state["base.parameters"] for state in states.values()} == {expected}
    # Adapters alone.
    assert states["student"]["student.parameters"] < states["student"]["discriminator.parameters"] < expected / 2


def test_it_has_learned_and_is_saved_merged(whole) -> None:
    base = AutoModelForCausalLM.from_pretrained(whole / "model")
    student = AutoModelForCausalLM.from_pretrained(whole / "run/student")
    adapter = load_file(whole / "run/student/adapter/adapter_model.safetensors")
    config = json.loads((whole / "run/student/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(whole / "model")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
    assert b.abs().max() > 0
    expected = base.get_submodule(name).weight + config["lora_alpha"] / config["r"] * (b @ a)
    torch.testing.assert_close(student.get_submodule(name).weight, expected)
    assert AutoModelForSequenceClassification.from_pretrained(whole / "run/discriminator").score.weight.shape == (1, 64)


@pytest.mark.parametrize("which", ["student", "discriminator"])
def test_the_last_checkpoint_is_exported_as_the_run_has_saved_it(whole, tmp_path, which) -> None:
    assert main(["export", str(whole / "run"), "--out", str(tmp_path / "out"), "--model", which]) == 0
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", whole / "run" / which))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    paths = (tmp_path / "out", whole / "run" / which)
    adapters = [(path / "adapter/adapter_model.safetensors").read_bytes() for path in paths]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--student.adapter_rank", "8"], "has adapters of rank 4, this run's student.adapter_rank is 8"),
        (["--student.adapter_alpha", "4"], "with a scale of 2, student.adapter_alpha"),
        (["--discriminator.adapter_targets", "q_proj"], "the discriminator's adapters stand beside other layers"),
        (["--student.adapter", "none", "--student.adapter_rank", "none"], "a run with student.adapter = lora"),
        (["--student.model", "OTHER"], "were trained on the base .* with the checksum"),
        (["--student.model", "GONE"], "no model .*gone"),
    ],
)
def test_another_adapter_or_base_is_told_when_the_run_goes_on(whole, tmp_path, capsys, changes, message) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    if "OTHER" in changes:
        save_tiny(tmp_path / "other", seed=1)
    changes = [{"OTHER": str(tmp_path / "other"), "GONE": str(tmp_path / "gone")}.get(c, c) for c in changes]
    last = newest(whole / "run").name
    assert main(["--run.dir", str(tmp_path / "run"), "--resume", last, *changes]) != 0
    import re

    assert re.search(message, " ".join(capsys.readouterr().err.split()))
