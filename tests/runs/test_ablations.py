"""Baselines, ablations, the gate and the convergence rule: every setting changes what it says, in whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.runs import records, run, tiny_arguments
from tests.support.tiny import save_tiny

STUDENT, DISCRIMINATOR = "student/model.safetensors", "discriminator/model.safetensors"


@pytest.fixture(scope="module")
def base(module_folder: Path) -> Path:
    """The folder of model and data, and in it the run without any of these settings."""
    finished(start(module_folder, module_folder / "plain"))
    return module_folder


def start(base: Path, to: Path, *settings: str) -> subprocess.CompletedProcess:
    flags = [part for setting in settings for part in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])]
    return run([*tiny_arguments(base), "--checkpoint.every", "1", "--run.dir", str(to), *flags], base)


def finished(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys(rows: list[dict], stage: str) -> list[set[str]]:
    return [set(row) for row in rows if row["stage"] == stage]


def test_no_warmup_of_the_student(base, tmp_path) -> None:
    finished(start(base, tmp_path / "run", "algorithm.student_warmup=false", "schedule.gad_steps=0"))
    assert (tmp_path / "run" / STUDENT).read_bytes() == (base / "model/model.safetensors").read_bytes()
    for row in records(tmp_path / "run"):
        assert "student/ce" not in row and "discriminator/grad_norm" in row


def test_no_warmup_of_the_discriminator(base, tmp_path) -> None:
    finished(start(base, tmp_path / "run", "algorithm.discriminator_warmup=false"))
    rows, plain = records(tmp_path / "run"), records(base / "plain")
    for row, other in zip(rows[:3], plain[:3], strict=True):
        # The student's warmup never looks at D.
        assert row["student/ce"] == other["student/ce"]
        assert (
            not any(key.startswith(("discriminator/", "reward/")) for key in row) and row.get("tokens/sampled") is None
        )
    assert all("discriminator/grad_norm" in row for row in rows[3:])


def test_a_frozen_discriminator_still_scores(base, tmp_path) -> None:
    finished(start(base, tmp_path / "run", "algorithm.freeze_discriminator=true"))
    rows, plain = records(tmp_path / "run"), records(base / "plain")
    assert rows[:3] == plain[:3]
    # The first GAD step is scored by the same D in both runs.
    assert rows[3]["reward/mean"] == plain[3]["reward/mean"] and rows[4]["reward/mean"] != plain[4]["reward/mean"]
    for row in rows[3:]:
        assert "discriminator/grad_norm" not in row and row["tokens/trained"] == row["tokens/student"]
    after = json.loads((tmp_path / "run/summary.json").read_text())["evaluations"]
    one, other = tmp_path / "short", tmp_path / "run"
    finished(start(base, one, "schedule.gad_steps=0"))
    assert (one / DISCRIMINATOR).read_bytes() == (other / DISCRIMINATOR).read_bytes()
    assert after["after_gad"]["accuracy"] is not None


def test_more_discriminator_steps(base, tmp_path) -> None:
    finished(start(base, tmp_path / "run", "algorithm.discriminator_steps=2"))
    rows, plain = records(tmp_path / "run"), records(base / "plain")
    assert rows[0]["tokens/discriminator"] == 2 * plain[0]["tokens/discriminator"]
    # Rewards and D's figures are from before the updates, so the first step tells the same.
    for key in ("reward/mean", "discriminator/loss", "discriminator/grad_norm", "student/ce"):
        assert rows[0][key] == plain[0][key]
    assert rows[1]["discriminator/loss"] != plain[1]["discriminator/loss"]
    assert rows[1]["student/ce"] == plain[1]["student/ce"]


def test_a_discriminator_that_steps_every_second_time(base, tmp_path) -> None:
    finished(start(base, tmp_path / "run", "algorithm.discriminator_every=2"))
    rows = records(tmp_path / "run")
    assert ["discriminator/grad_norm" in row for row in rows] == [False, True, False] + [False, True, False, True]
    assert all("reward/mean" in row for row in rows)


def test_std_floor_changes_the_student_alone(base, tmp_path) -> None:
    finished(start(base, tmp_path / "run", "algorithm.advantage_std_floor=0.5"))
    rows, plain = records(tmp_path / "run"), records(base / "plain")
    assert rows[:3] == plain[:3]
    assert rows[3]["reward/mean"] == plain[3]["reward/mean"]
    assert rows[3]["student/grad_norm"] < plain[3]["student/grad_norm"]


@pytest.mark.parametrize("setting", ["discriminator.label_smoothing=0.2", "discriminator.margin_cap=0.01"])
def test_remedies_reach_the_loss(base, tmp_path, setting) -> None:
    finished(start(base, tmp_path / "run", setting))
    first, plain = records(tmp_path / "run")[0], records(base / "plain")[0]
    assert first["discriminator/loss"] != plain["discriminator/loss"]
    assert first["discriminator/margin"] == plain["discriminator/margin"]


def save_other_family(directory: Path, context: int = 256) -> Path:
    """A Qwen2 whose tokenizer writes every byte as a token, in a template without newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|turn|>", "<|stop|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    save_tiny(directory, "qwen2", seed=3)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|stop|>",
        pad_token="<|pad|>",
        chat_template="{% for m in messages %}"
        "{{ '<|turn|>' + m['role'] + ' ' + m['content'] + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant ' }}{% endif %}",
    ).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": context}))
    return directory


def test_a_discriminator_of_another_family_and_vocabulary(base, tmp_path) -> None:
    other = save_other_family(tmp_path / "other")
    finished(start(base, tmp_path / "run", f"discriminator.model={other}"))
    rows, plain = records(tmp_path / "run"), records(base / "plain")
    for row, same in zip(rows[:3], plain[:3], strict=True):
        # D changes nothing in the student's warmup, and counts its own tokens: one a byte.
        assert row["student/ce"] == same["student/ce"] and row["tokens/sampled"] == same["tokens/sampled"]
        assert row["tokens/discriminator"] > same["tokens/discriminator"]
    assert rows[3]["reward/mean"] != plain[3]["reward/mean"]
    exported = json.loads((tmp_path / "run/discriminator/config.json").read_text())
    assert exported["model_type"] == "qwen2"


def test_a_row_that_the_discriminators_context_cannot_hold_is_told_at_the_start(base, tmp_path) -> None:
    other = save_other_family(tmp_path / "other", context=40)
    refused = start(base, tmp_path / "run", f"discriminator.model={other}")
    assert refused.returncode == 2 and "whose context has 40" in refused.stderr
    assert "or choose another discriminator.model" in refused.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.critic_warmup=3"], "covers all 3 steps of the warmup"),
        (["algorithm.student_warmup=false", "algorithm.discriminator_warmup=false"], "leave the warmup nothing to do"),
        (["algorithm.freeze_discriminator=true", "schedule.warmup_steps=0"], "leaves it untrained"),
        (["algorithm.freeze_discriminator=true", "algorithm.discriminator_warmup=false"], "leaves it untrained"),
        (["gate.enabled=true", "schedule.warmup_steps=0"], "there is none: raise schedule.warmup_epochs"),
    ],
)
def test_what_leaves_a_model_untrained_is_refused(base, tmp_path, settings, message) -> None:
    refused = start(base, tmp_path / "run", *settings)
    assert refused.returncode == 2 and message in refused.stderr


def test_a_gate_that_stays_closed_stops_the_run_and_can_be_gone_through(base, tmp_path) -> None:
    to = tmp_path / "run"
    gate = ["gate.enabled=true", "gate.low=0", "gate.high=0.0001", "gate.every=2", "gate.extra_steps=3", "gate.rows=3"]
    stopped = start(base, to, *gate)
    assert stopped.returncode == 2 and "the gate stays closed" in stopped.stderr
    assert "the warmup goes on for 2 further steps" in stopped.stdout
    assert "still closed after all 3 extra warmup steps, the run stops" in stopped.stdout
    assert [row["stage"] for row in records(to)] == ["warmup"] * 6
    assert [row["stage_steps"] for row in records(to)] == [3, 3, 3, 5, 5, 6]

    out = finished(run(["--run.dir", str(to), "--resume", "auto", "--gate.when_closed", "go_on"], tmp_path))
    assert "the GAD stage begins all the same" in out
    summary = json.loads((to / "summary.json").read_text())
    assert summary["steps"] == {"warmup": 6, "gad": 4}
    assert [step for step, _ in summary["gate"]["measured"]] == [3, 5, 6] and summary["gate"]["extra"] == 3
    assert "still closed" in (to / "report.html").read_text()


def test_an_open_gate_changes_nothing_but_what_is_said(base, tmp_path) -> None:
    out = finished(start(base, tmp_path / "run", "gate.enabled=true", "gate.low=0", "gate.high=1", "gate.rows=4"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["gate"]["measured"] == [[3, summary["evaluations"]["after_warmup"]["accuracy"]]]
    assert "the GAD stage begins" in out and records(tmp_path / "run") == records(base / "plain")


CONVERGENCE = ["convergence.enabled=true", "convergence.every=1", "convergence.rows=4", "convergence.steps=1"]


def test_a_plateau_ends_the_stage_with_the_student_of_the_minimum(base, tmp_path) -> None:
    """A tolerance of 1 makes everything a plateau; checkpoint.keep would have deleted the checkpoint of the start."""
    to = tmp_path / "run"
    settings = ["convergence.patience=3", "convergence.tolerance=1", "convergence.rise=2", "checkpoint.keep=1"]
    out = finished(start(base, to, *CONVERGENCE, *settings))
    assert "it no longer falls, the GAD stage ends" in out
    summary = json.loads((to / "summary.json").read_text())
    found = summary["convergence"]
    steps = [step for step, *_ in found["measured"]]
    assert steps == [3, 4, 5, 6] and found["stopped"] == "plateau" and summary["steps"]["gad"] == 3
    best = min(found["measured"], key=lambda each: each[1])[0]
    assert found["best"][0] == best
    assert (to / STUDENT).read_bytes() == (of_steps(base, tmp_path, best - 3) / STUDENT).read_bytes()
    assert (to / f"checkpoints/step-{best:06d}").is_dir()
    assert "fresh discriminator" in (to / "report.html").read_text()


def of_steps(base: Path, tmp_path: Path, gad_steps: int) -> Path:
    folder = tmp_path / f"gad {gad_steps}"
    finished(start(base, folder, f"schedule.gad_steps={gad_steps}"))
    return folder


SCRIPT = """
import sys
from pathlib import Path
from gadcore.train import heldout, trainer
from gadcore.measure.fresh import FreshResult
from gadcore.run import main

# One accuracy for every global step: what decides is the rule, not a tiny model's noise.
FIGURES = {3: 0.9, 4: 0.7, 5: 0.75, 6: 0.81, 7: 0.6}
current = None

def measure(groups, make_discriminator, settings, seed):
    accuracy = FIGURES[current.progress.step]
    return FreshResult(accuracy, (accuracy - 0.1, accuracy + 0.1), 1.0, len(groups), 1.0, 1, (), ())

original = trainer.Trainer._measure_convergence

def look(self):
    global current
    current = self
    return original(self)

trainer.Trainer._measure_convergence, heldout.measure = look, measure
stop_at = int(sys.argv.pop(1))
if stop_at:
    record = trainer.Trainer.record

    def killed(self, *args, **kwargs):
        record(self, *args, **kwargs)
        if self.progress.step == stop_at:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.Trainer.record = killed
sys.exit(main(sys.argv[1:]))
"""


# Each is three runs: one moment always, the others by hand.
@pytest.mark.parametrize("killed_after", [4, *(pytest.param(step, marks=pytest.mark.by_hand) for step in (0, 5, 6))])
def test_a_rise_rolls_back_also_in_a_resumed_run(base, tmp_path, killed_after) -> None:
    script, to = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    arguments = [*tiny_arguments(base), "--run.dir", str(to), "--checkpoint.every", "2", "--checkpoint.keep", "1"]
    flags = [part for s in CONVERGENCE for part in (f"--{s.split('=')[0]}", s.split("=")[1])]
    done = run([*arguments, *flags], tmp_path, command=[sys.executable, str(script), str(killed_after)])
    if killed_after:
        assert done.returncode == -9, done.stderr
        done = run(["--run.dir", str(to), "--resume", "auto"], tmp_path, command=[sys.executable, str(script), "0"])
    out = finished(done)
    # The checkpoint of step 6 holds the decision already.
    assert killed_after == 6 or "up from 0.700 at step 4: the GAD stage ends, back to step 4" in out
    assert "the final student is that of step 4" in out
    found = json.loads((to / "summary.json").read_text())["convergence"]
    assert [each[:2] for each in found["measured"]] == [[3, 0.9], [4, 0.7], [5, 0.75], [6, 0.81]]
    assert found["stopped"] == "rise" and found["best"] == [4, 0.7]
    assert [row["step"] for row in records(to)] == [1, 2, 3, 4, 5, 6]
    expected = of_steps(base, tmp_path, 1)
    for name in (STUDENT, DISCRIMINATOR):
        assert (to / name).read_bytes() == (expected / name).read_bytes()


def test_convergence_needs_rows_to_measure_on(base, tmp_path) -> None:
    refused = start(base, tmp_path / "run", *CONVERGENCE, "data.eval_rows=3")
    assert refused.returncode == 2 and "needs 4 held-out rows or more, there are 3" in refused.stderr


def test_a_health_warning_is_in_the_log_the_report_and_the_summary_once(base, tmp_path) -> None:
    """Two tokens are too few for nearly every response."""
    out = finished(start(base, tmp_path / "run", "data.max_response_tokens=2"))
    assert out.count("note warning: Many responses are cut. ") == 1
    assert "<strong>Many responses are cut.</strong>" in (tmp_path / "run/report.html").read_text()
    health = json.loads((tmp_path / "run/summary.json").read_text())["health"]
    (episode,) = [e for e in health if e["warning"]["title"] == "Many responses are cut"]
    # Told at the third step of the GAD stage, the first ones are too few to score by.
    assert episode["first"] == 6 and episode["last"] is None
