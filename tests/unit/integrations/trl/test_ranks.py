"""The discriminator on several ranks: one step of all groups, equal weights everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gadcore import Discriminator, DiscriminatorSettings, Group
from gadcore.integrations.trl.update import Update
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT
from tests.support.tiny import save_tiny

TEXTS = [
    ("Name a city.", "Paris.", ["It is a city on the Seine.", "Zero"], [True, False]),
    ("What boils?", "Water boils at one hundred degrees.", ["Stop", "Paris.", "a"], [True, True, False]),
    ("Write.", "A short answer.", ["Short."], [True]),
]


def updated(model: str) -> tuple[list[Any], list[float], dict[str, torch.Tensor]]:
    """Two steps: of three groups that come in two calls, and of one group alone."""
    d = Discriminator.load(model, DiscriminatorSettings(lr=1e-3), device="cpu", seed=3)
    groups: list[Group] = [d.group(*texts) for texts in TEXTS]
    update, found = Update(d), []
    for calls in ((groups[:2], groups[2:]), (groups[1:2],)):
        for call in calls:
            scored = update.add(call, backward=True)
            found.append((scored.rewards, scored.teacher_scores, scored.figures))
        found.append(update.step())
    return found, [p.grad is None for p in d.model.parameters()], dict(d.state_dict())


def on_a_rank(world: Any, model: str) -> Any:
    return updated(model)


def close(found: Any, expected: Any) -> None:
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        close(list(found.values()), list(expected.values()))
    else:
        for one, other in zip(found, expected, strict=True):
            close(one, other)


def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    expected, cleared, state = updated(model)
    assert all(cleared)
    ranks = run_ranks(2, "tests.unit.integrations.trl.test_ranks:on_a_rank", model, deadline=300)
    for found, _, weights in ranks:
        close(found, expected)
        for name, value in weights.items():
            assert torch.equal(value, ranks[0][2][name]), name
            torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-6)


PROGRAM = """
import json, os, sys
from pathlib import Path
from trl import GRPOTrainer
from gadcore import Discriminator, DiscriminatorSettings
from gadcore.integrations.trl import GADGRPOTrainer, GADReward
from tests.support.trl_trainers import make, replayed
model, folder, rows, kind = sys.argv[1:]
reward = GADReward(Discriminator.load(model, DiscriminatorSettings(lr=1e-3), device="cpu", seed=3))
trl = make({"TRL": GRPOTrainer, "gadcore": GADGRPOTrainer}[kind], Path(model), Path(folder), reward_funcs=[reward],
           callbacks=[reward], rollout_func=replayed, shuffle_dataset=False, max_steps=2, optim="sgd", save_steps=2,
           save_strategy="steps", per_device_train_batch_size=int(rows))
trl.train()
if trl.accelerator.is_main_process:
    log = [{k: v for k, v in e.items() if "time" not in k and "second" not in k} for e in trl.state.log_history[:2]]
    Path(folder, "log.json").write_text(json.dumps(log))
"""


@pytest.mark.by_hand
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["TRL", "gadcore"])
def test_a_group_that_is_split_over_ranks(kind: str, tmp_path: Path) -> None:
    """Of four samples a prompt, two are drawn on each rank of TRL's trainer under DistributedDataParallel."""
    model = str(save_tiny(tmp_path / "model"))
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for ranks, start in ((1, [sys.executable]), (2, launch)):
        command = [*start, str(tmp_path / "program.py"), model, str(tmp_path / str(ranks)), str(4 // ranks), kind]
        subprocess.run(command, env=environment, check=True)
    one, two = (json.loads((tmp_path / str(ranks) / "log.json").read_text()) for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        for key in ("reward", "discriminator/loss", "discriminator/accuracy", "discriminator/grad_norm", "entropy"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    for file in ("discriminator-state.safetensors", "model.safetensors"):
        whole, split = (load_file(tmp_path / str(ranks) / "checkpoint-2" / file) for ranks in (1, 2))
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=1e-3, atol=1e-5)
