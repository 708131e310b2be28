"""A policy step of one group: GADGRPOTrainer beside TRL's GRPOTrainer, on the CPU.

What is measured is what TRL does with samples that are there: log-probabilities of a reference policy (the policy
itself, without gradients: the same pass), loss and backward pass. Both trainers compute on models of equal weights,
in one process, in turn; their losses and gradients are held to each other first. Seconds are of CPU time at one thread,
so that others on the machine delay a measurement more than they change it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import options, record
from bench.peak import extra_peak
from bench.runner import Side, order

Row = dict[str, Any]
MODEL = "smollm2-135m-instruct"
SAMPLES = 8
# Prompt and response tokens.
CASES = ("64x32", "256x64", "512x128")
ROUNDS = 3
# Of float32 sums in another order, relative to the whole gradient's norm.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=options.names, default=CASES, help=f"default {','.join(CASES)}")
    parser.add_argument("--rounds", type=options.count, default=ROUNDS, help=f"default {ROUNDS}")


def key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["threads"]


def run(quick: bool, *, cases: Sequence[str] = CASES, rounds: int = ROUNDS) -> Iterator[Row]:
    """A row for every case. quick: a random model of two layers and one short case."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sides = [Trained(own, quick, Path(folder)) for own in (False, True)]
        for case in ["12x4"] if quick else cases:
            prompt, response = map(int, case.split("x"))
            yield measured(case, _inputs(prompt, response, sides[0].vocabulary), sides, 1 if quick else rounds)


class Trained:
    """A trainer with its model. own: gadcore's."""

    def __init__(self, own: bool, quick: bool, folder: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
        from trl import GRPOConfig, GRPOTrainer

        from gadcore.integrations.trl import GADGRPOTrainer
        from gadcore.models.loading import resolve_model

        path = resolve_model(MODEL)
        torch.manual_seed(0)
        if quick:
            config = LlamaConfig(
                vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                tie_word_embeddings=True,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.name = "gadcore" if own else "TRL"
        self.vocabulary = model.config.vocab_size
        kind = GADGRPOTrainer if own else GRPOTrainer
        self.trainer = kind(
            model,
            [lambda completions, **_: [0.0] * len(completions)],
            GRPOConfig(
                str(folder / self.name), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                per_device_train_batch_size=SAMPLES, num_generations=SAMPLES, temperature=0.8, loss_type="dapo",
                use_bias_correction_kl=False,
            ),
            Dataset.from_list([{"prompt": "?"}] * SAMPLES),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        )  # fmt: skip
        self.trainer.beta = 0.001
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1

    def step(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss and gradients of a group."""
        trainer = self.trainer
        trainer.model.zero_grad(set_to_none=True)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            reference, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, seen, inputs["completion_ids"].shape[1], batch_size=len(ids)
            )
        loss = trainer._compute_loss(trainer.model, {**inputs, "ref_per_token_logps": reference})
        loss.backward()
        return {"loss": loss.detach()}

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.trainer.model.parameters() if p.grad is not None])


def measured(case: str, inputs: dict[str, Tensor], sides: Sequence[Trained], rounds: int) -> Row:
    losses, gradients, peaks = [], [], []
    for side in sides:
        # The first call allocates what the others find.
        side.step(inputs)
        found, peak = extra_peak(_call(side, inputs))
        losses.append(float(found["loss"]))
        gradients.append(side.gradient())
        peaks.append(peak)
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    gradients.clear()
    runs: dict[str, list[float]] = {side.name: [] for side in sides}
    turns = [Side(side.name, _call(side, inputs)) for side in sides]
    for index in range(rounds):
        for turn in order(turns, index):
            start = time.process_time()
            turn.call()
            runs[turn.name].append(time.process_time() - start)
        record.say(f"trl: {case}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in runs.items()))
    prompt, response = map(int, case.split("x"))
    theirs, ours = (statistics.median(runs[side.name]) for side in sides)
    return {
        "case": case, "prompt": prompt, "response": response, "samples": SAMPLES, "threads": 1,
        "ours": {"median_s": ours, "runs": runs[sides[1].name], "peak_bytes": peaks[1]},
        "theirs": {"median_s": theirs, "runs": runs[sides[0].name], "peak_bytes": peaks[0]},
        "ratio": statistics.median(t / o for t, o in zip(runs["TRL"], runs["gadcore"], strict=True)),
        "gradient_error": error, "loss_difference": abs(losses[1] - losses[0]),
        "gate": "pass" if error < TOLERANCE and abs(losses[1] - losses[0]) < TOLERANCE else "fail",
        "load": os.getloadavg()[0],
    }  # fmt: skip


def _call(side: Trained, inputs: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: side.step(inputs)


def _inputs(prompt: int, response: int, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (1, prompt), generator=generator).expand(SAMPLES, -1)
    completions = torch.randint(3, vocabulary, (SAMPLES, response), generator=generator)
    return {
        "prompt_ids": ids, "prompt_mask": torch.ones_like(ids),
        "completion_ids": completions, "completion_mask": torch.ones_like(completions),
        "advantages": torch.randn(SAMPLES, generator=generator),
        "num_items_in_batch": torch.tensor(SAMPLES * response),
    }  # fmt: skip
