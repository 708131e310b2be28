"""A run as gadcore.train.build sets it up, on a device that is counted: nothing is there twice, at no time."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gadcore import cpu
from gadcore.algorithm import train
from gadcore.checkpoint import store
from gadcore.config import loading
from gadcore.distributed.world import World
from gadcore.errors import UserError
from gadcore.memory import colocation
from gadcore.record.plain import PlainView
from gadcore.record.run_folder import run_folder
from gadcore.record.text import RunPlan
from gadcore.run import main
from gadcore.train.build import build
from gadcore.train.inputs import read_inputs
from tests.support.device_bytes import DeviceBytes, HostTier
from tests.support.runs import tiny_arguments
from tests.support.tiny import tiny_tokenizer

SETTINGS = {
    "run.device": "cpu",
    "memory.offload": "file",
    "memory.prefetch": "false",
    "schedule.batch_size": 2,
    "schedule.warmup_steps": 1,
    "schedule.gad_steps": 2,
    "schedule.micro_batch_tokens": 128,
    "schedule.activation_checkpointing": "full",
    "rollout.group_size": 2,
    "data.max_response_tokens": 4,
    "data.eval_rows": 4,
    "convergence.enabled": "true",
    "convergence.rows": 4,
    "convergence.steps": 1,
    "convergence.every": 1,
    "checkpoint.every": 1,
    "tracking.monitor_interval": 0,
}


@pytest.fixture
def device(monkeypatch):
    device = DeviceBytes()
    monkeypatch.setattr(colocation, "meter_of", lambda _: device)
    monkeypatch.setattr(colocation, "make_tier", lambda name, device, folder, holding, size: HostTier(size))
    # What belongs to a process of its own.
    monkeypatch.setattr(cpu, "install", lambda: None)
    # As on a GPU: a model is read into the host's memory, and moves; a checkpoint stays there.
    to, load = PreTrainedModel.to, store.load

    def moved(model: PreTrainedModel, *args: object) -> PreTrainedModel:
        for p in model.parameters():
            p.data = p.data.clone()
        return to(model, *args)  # type: ignore[arg-type]

    def loaded(path: Path, *world: World) -> store.Checkpoint:
        with _disable_current_modes():
            return load(path, *world)

    monkeypatch.setattr(PreTrainedModel, "to", moved)
    monkeypatch.setattr(store, "load", loaded)
    return device


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Models whose weights are far more than what passes over a few tokens take."""
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=320, max_position_embeddings=256, eos_token_id=2, bos_token_id=None, **shape)
    model = tmp_path / "model"
    given = tiny_arguments(tmp_path)
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    return [*given, *(str(item) for k, v in SETTINGS.items() for item in (f"--{k}", v))]


# Of a model's parameters: gradients and moments make it four, activations a little more. The rest is the fresh
# discriminator's own optimizer step.
MOST = {
    "set-up": 3.1,
    "synchronise": 1.1,
    "rollout": 1.2,
    "discriminator": 2.2,
    "discriminator_update": 4.1,
    "reference": 1.2,
    "student": 2.2,
    "student_update": 4.1,
    "rest": 4.1,
}


def test_no_state_holds_more_than_it_needs(device, arguments, tmp_path, monkeypatch) -> None:
    """Evaluations, checkpoints, convergence rule and the way back to its best included."""
    config = loading.load([*arguments, "--run.dir", str(tmp_path / "run")])
    stages: tuple[str, ...] = ("warmup", "gad")
    peaks: dict[str, int] = defaultdict(int)
    enter = colocation.Colocation.enter

    def entered(memory: colocation.Colocation, state: colocation.State) -> None:
        name = memory.state or "set-up"
        peaks[name] = max(peaks[name], device.peak_live)
        enter(memory, state)
        device.peak_live = device.live

    monkeypatch.setattr(colocation.Colocation, "enter", entered)
    with device, run_folder(config) as folder:
        inputs = read_inputs(config, stages)
        device.peak_live = device.live
        with build(config, stages, inputs, folder, stop_requested=lambda: None) as trainer:
            parameters = trainer.memory._arenas["student.parameters"].bytes
            assert device.live < 0.1 * parameters, "everything waits"
            train(trainer)
    assert trainer.progress.convergence.best is not None
    found = {state: peak / parameters for state, peak in peaks.items()}
    assert found.keys() == MOST.keys()
    assert {state: share for state, share in found.items() if share > MOST[state]} == {}, found
    assert found["student_update"] > 3.9 and found["set-up"] > 2.9, "they are counted"


def test_the_view_is_told_the_planners_seconds_of_a_step(tmp_path, monkeypatch, capsys) -> None:
    plans: list[RunPlan] = []

    def start(view: PlainView, plan: RunPlan) -> None:
        plans.append(plan)
        raise UserError("enough")

    monkeypatch.setattr(PlainView, "start", start)
    assert main(["train", *tiny_arguments(tmp_path), "--run.dir", str(tmp_path / "run")]) == 2
    assert "enough" in capsys.readouterr().err
    seconds = plans[0].step_seconds
    assert list(seconds) == [name for name, _ in plans[0].stages]
    assert 0 < seconds["warmup"] < seconds["gad"], "the student's samples are more than the teacher's one response"
