"""A DPO step on the same pairs: SODA's packed groups beside TRL's DPOTrainer, on the CPU.

Both sides get the pairs with their reference log-probs, which either computes once for a data set, and make loss and
gradients of one batch from models of equal weights, in one process, in turn. TRL has a padded row for every response of
every pair, gadcore a packed group whose prompt and teacher's response stand there once. Seconds are of CPU time at one
thread. No ratio is given before losses and gradients of both agree with a literal DPO in fp64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from bench import options, record
from bench.peak import extra_peak
from bench.runner import Side, order
from bench.soda.problem import BETA, Literal, Shape, gradient_of, literal, tokens_of
from gadcore.config.settings import AlgorithmSettings, StudentSettings
from gadcore.data.groups import Group
from gadcore.errors import UserError
from gadcore.models.loading import resolve_model
from gadcore.models.preference import preference_backward
from gadcore.models.student import Student

Row = dict[str, Any]
MODEL = "smollm2-135m-instruct"
# Tokens of a prompt, of the longest response, samples to a prompt, prompts. SODA's own is one sample.
CASES = ("64x64x1x8", "256x64x1x4", "256x128x4x2")
SMALL = "12x8x2x2"
ROUNDS = 3
# Packed tokens of a pass of ours; of TRL's, the rows of as many pairs.
MICRO_BATCH_TOKENS = 2048
# Of float32 sums against fp64, relative to the whole gradient's norm.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=options.names, default=CASES, help=f"default {','.join(CASES)}")
    parser.add_argument("--rounds", type=options.count, default=ROUNDS, help=f"default {ROUNDS}")


def key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["threads"]


def run(quick: bool, *, cases: Sequence[str] = CASES, rounds: int = ROUNDS) -> Iterator[Row]:
    """A row for every case. quick: a random model of two layers and one small case.

    Raises UserError for a case that is none.
    """
    try:
        shapes = {case: Shape.of(case) for case in ([SMALL] if quick else cases)}
    except (ValueError, TypeError):
        raise UserError(f"--cases {','.join(cases)}: a case is PROMPTxRESPONSExSAMPLESxGROUPS, as {CASES[0]}") from None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sides: list[Trained] = [Theirs(_model(quick), Path(folder)), Ours(_model(quick))]
        for case, shape in shapes.items():
            groups = shape.batch(sides[0].model.config.vocab_size, sides[0].model.config.eos_token_id)
            exact = _model(quick).double()
            expected = literal(exact, groups)
            del exact
            yield measured(case, groups, expected, sides, 1 if quick else rounds)


def _model(quick: bool) -> PreTrainedModel:
    if not quick:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model(MODEL), dtype=torch.float32, attn_implementation="sdpa"
        )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


class Trained(Protocol):
    """A side: its name, its model, and the loss of a batch, whose gradients it leaves in the model."""

    name: str
    model: PreTrainedModel

    def step(self, groups: Sequence[Group], reference: Sequence[Sequence[float]]) -> float: ...


class Ours:
    """gadcore's Student, as a run makes it."""

    name = "gadcore"

    def __init__(self, model: PreTrainedModel) -> None:
        self.student = Student(
            model,
            StudentSettings(),
            AlgorithmSettings(),
            temperature=1.0,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            activation_checkpointing="off",
        )
        self.model = self.student.model

    def step(self, groups: Sequence[Group], reference: Sequence[Sequence[float]]) -> float:
        self.model.zero_grad(set_to_none=True)
        return preference_backward(self.student, groups, reference, BETA).loss


class Theirs:
    """TRL's trainer with its collator and its loss, set up as well as it can be for a CPU: fp32, sdpa, no gradient
    checkpointing, reference log-probs precomputed, as many pairs in a pass as ours has tokens."""

    name = "TRL"

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self.trainer = DPOTrainer(
            model,
            args=DPOConfig(
                str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                beta=BETA, loss_type="sigmoid", precompute_ref_log_probs=True, max_length=None,
                disable_dropout=True, per_device_train_batch_size=1,
            ),
            train_dataset=Dataset.from_list([{"prompt": "?", "chosen": " yes", "rejected": " no"}]),
            processing_class=AutoTokenizer.from_pretrained(resolve_model(MODEL)),
        )  # fmt: skip
        self.model = self.trainer.model
        self.model.train()

    def step(self, groups: Sequence[Group], reference: Sequence[Sequence[float]]) -> float:
        self.model.zero_grad(set_to_none=True)
        pairs = [
            {
                "prompt_ids": list(group.prompt.token_ids),
                "chosen_ids": list(group.teacher.token_ids),
                "rejected_ids": list(sample.token_ids),
                "ref_chosen_logps": known[0],
                "ref_rejected_logps": value,
            }
            for group, known in zip(groups, reference, strict=True)
            for sample, value in zip(group.samples, known[1:], strict=True)
        ]
        longest = max(
            len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"]))  # type: ignore[arg-type]
            for p in pairs
        )
        at_once = max(1, MICRO_BATCH_TOKENS // (2 * longest))
        total = 0.0
        for begin in range(0, len(pairs), at_once):
            cut = pairs[begin : begin + at_once]
            inputs = self.trainer.data_collator(cut)
            loss = self.trainer.compute_loss(self.model, inputs) * (len(cut) / len(pairs))
            loss.backward()
            total += loss.item()
        return total


def measured(case: str, groups: Sequence[Group], expected: Literal, sides: Sequence[Trained], rounds: int) -> Row:
    """A row of one case; a failed gate leaves out ratio and tokens a second."""
    found: dict[str, Row] = {}
    for side in sides:
        # The first call allocates what the others find.
        side.step(groups, expected.reference)
        loss, peak = extra_peak(_call(side, groups, expected.reference))
        found[side.name] = {
            "loss_error": abs(loss - expected.loss) / abs(expected.loss),
            "gradient_error": _error(gradient_of(side.model), expected.gradient),
            "peak_bytes": peak,
            "runs": [],
        }
    worst = max(max(each["loss_error"], each["gradient_error"]) for each in found.values())
    row: Row = {"case": case, "threads": 1, "tokens": tokens_of(groups), "pairs": sum(len(g.samples) for g in groups)}
    row |= {"tolerance": TOLERANCE, "gate": "pass" if worst < TOLERANCE else "fail"}
    turns = [Side(side.name, _timed(side, groups, expected.reference)) for side in sides]
    for index in range(rounds if row["gate"] == "pass" else 0):
        for turn in order(turns, index):
            start = time.process_time()
            turn.call()
            found[turn.name]["runs"].append(time.process_time() - start)
        record.say(f"soda: {case}: " + ", ".join(f"{name} {each['runs'][-1]:.2f} s" for name, each in found.items()))
    theirs, ours = (found[side.name] for side in sides)
    if row["gate"] == "pass":
        for each in found.values():
            each["median_s"] = statistics.median(each["runs"])
            each["tokens_per_second"] = row["tokens"] / each["median_s"]
        row["ratio"] = statistics.median(t / o for t, o in zip(theirs["runs"], ours["runs"], strict=True))
    return {**row, "ours": ours, "theirs": theirs, "load": os.getloadavg()[0]}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _call(side: Trained, groups: Sequence[Group], reference: Sequence[Sequence[float]]) -> Callable[[], float]:
    return lambda: side.step(groups, reference)


def _timed(
    side: Trained, groups: Sequence[Group], reference: Sequence[Sequence[float]]
) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"loss": torch.tensor(side.step(groups, reference))}
