"""Where holdings wait changes nothing in a run: same metrics and weights to the bit, also of one that was killed."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gadcore.memory.holdings import NEEDS
from tests.support.runs import ROOT, assert_same_run, run, tiny_arguments

OFFLOAD = ["--memory.offload", "file"]


def made(folder: Path, name: str, *settings: str, engine: str = "hf") -> Path:
    done = run([*tiny_arguments(folder, engine), *settings, "--run.dir", name], folder)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def plain(module_folder: Path) -> Path:
    return made(module_folder, "run")


def test_offload_to_files_changes_no_bit(plain, tmp_path) -> None:
    settings = ["--memory.dir", str(tmp_path / "waiting")]
    offloaded = made(plain.parent, "offloaded", *OFFLOAD, *settings)
    assert_same_run(offloaded, plain)
    assert list((tmp_path / "waiting").iterdir()) == []
    memory = json.loads((offloaded / "summary.json").read_text())["memory"]
    assert memory["offload"] == "file"
    held = {state: set(holders) - {"process", "allocator", "work"} for state, holders in memory["states"].items()}
    for model in ("student", "discriminator"):
        assert held[model] == {f"{model}.parameters", f"{model}.gradients"}
        assert held[f"{model}_update"] == held[model] | {f"{model}.optimizer"}
    assert held["reference"] == {"reference.parameters"}
    assert held["rollout"] == held["synchronise"] == {"student.parameters"}
    rows = [json.loads(line) for line in (offloaded / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        states = set(NEEDS) - {"rest"} - ({"reference"} if row["stage"] == "warmup" else set())
        for state in states:
            assert 0 < row[f"memory/{state}_held"] <= row[f"memory/{state}_peak"]


@pytest.mark.parametrize(("moment", "count"), [("rollout", 7), ("update", 6), ("checkpoint", 8)])
def test_killed_while_holdings_are_out_and_resumed(plain, tmp_path, moment, count) -> None:
    killer = [sys.executable, str(ROOT / "tests/support/killed_run.py"), moment, str(count), "--"]
    arguments = [*tiny_arguments(plain.parent), *OFFLOAD, "--run.dir", str(tmp_path / "run")]
    assert run(arguments, tmp_path, command=killer).returncode == -signal.SIGKILL
    # What waited in a file of the killed process left no trace.
    assert list((tmp_path / "run/offload").iterdir()) == []
    done = run(["--resume", "auto", "--run.dir", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", plain)


def test_a_checkpoint_can_be_resumed_with_another_offload(plain, tmp_path) -> None:
    killer = [sys.executable, str(ROOT / "tests/support/killed_run.py"), "rollout", "7", "--"]
    arguments = [*tiny_arguments(plain.parent), *OFFLOAD, "--run.dir", str(tmp_path / "run")]
    assert run(arguments, tmp_path, command=killer).returncode == -signal.SIGKILL
    done = run(["--resume", "auto", "--run.dir", str(tmp_path / "run"), "--memory.offload", "none"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", plain)


def test_masters_in_host_memory_are_resumed_to_the_bit_and_saved(plain, tmp_path) -> None:
    masters = ["--student.master", "host", "--discriminator.master", "host"]
    whole = made(plain.parent, "masters", *masters)
    killer = [sys.executable, str(ROOT / "tests/support/killed_run.py"), "update", "6", "--"]
    arguments = [*tiny_arguments(plain.parent), *masters, *OFFLOAD, "--run.dir", str(tmp_path / "run")]
    assert run(arguments, tmp_path, command=killer).returncode == -signal.SIGKILL
    done = run(["--resume", "auto", "--run.dir", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", whole)
    for model in ("student", "discriminator"):
        saved = load_file(whole / model / "model.safetensors")
        newest = load_file(sorted((whole / "checkpoints").iterdir())[-1] / f"{model}.safetensors")
        assert all(value.dtype == torch.float32 for value in saved.values())
        assert all(torch.equal(value, newest[name]) for name, value in saved.items())
    memory = json.loads((whole / "summary.json").read_text())["memory"]["states"]
    assert not any(name.endswith(".optimizer") for holders in memory.values() for name in holders)
    wide = json.loads((plain / "summary.json").read_text())["memory"]["states"]
    for state, name in (("student", "student"), ("discriminator", "discriminator")):
        assert memory[state][f"{name}.gradients"] == wide[state][f"{name}.gradients"]
        assert memory[state][f"{name}.parameters"] < 0.51 * wide[state][f"{name}.parameters"]


@pytest.mark.slow
def test_four_ways_of_holding_weights_with_vllm_are_one_run(tmp_path) -> None:
    pytest.importorskip("vllm")
    runs = []
    for offload in ("none", "file"):
        for shared in ("true", "false"):
            settings = ["--memory.offload", offload, "--memory.shared_weights", shared]
            runs.append(made(tmp_path, f"{offload}-{shared}", *settings, engine="vllm"))
    for other in runs[1:]:
        assert_same_run(other, runs[0])
    memory = {r.name: json.loads((r / "summary.json").read_text())["memory"]["states"] for r in runs}
    assert "engine.weights" not in memory["file-true"]["rollout"]
    own = memory["file-false"]
    assert own["rollout"]["engine.weights"] == own["synchronise"]["student.parameters"]
    assert "student.parameters" not in own["rollout"]


def test_a_limit_ends_a_run_with_the_list_of_holders(plain, tmp_path) -> None:
    settings = ["--memory.limit_gib", "0.1", "--run.dir", str(tmp_path / "run")]
    done = run([*tiny_arguments(plain.parent), *settings], tmp_path)
    assert done.returncode == 2
    assert "of 0.10 GiB allowed" in done.stderr and "process" in done.stderr and "memory.limit_gib" in done.stderr
    assert not (tmp_path / "run").exists(), "refused before anything is made"


def test_what_a_cpu_cannot_do_is_refused(plain, tmp_path) -> None:
    done = run([*tiny_arguments(plain.parent), "--memory.offload", "pinned"], tmp_path)
    assert done.returncode == 2 and "memory.offload = pinned" in done.stderr
