"""No sum of a step depends on the order in which a GPU's threads arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from bench.offline.cuda_standin import gpu
from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student
from tests.support.builders import TEMPLATE, groups
from tests.support.nondeterminism import Looked, known
from tests.support.tiny import save_tiny, tiny_model

MEMORY = 1 << 30


def repeating() -> list[Any]:
    """Groups with equal samples among them."""
    batch = groups(2, 2)
    batch[0].samples[1] = batch[0].samples[0]
    return batch


@pytest.mark.parametrize(
    ("kind", "tied", "budget", "autocast"),
    [
        pytest.param("llama", True, 60, "none", marks=pytest.mark.slow),
        ("qwen2", False, 10**6, "bfloat16"),
    ],
)
def test_of_the_student(kind: str, tied: bool, budget: int, autocast: str) -> None:
    with gpu(MEMORY):
        ours = Student(
            tiny_model(kind, tied=tied).to("cuda"),
            StudentSettings(autocast=autocast),
            AlgorithmSettings(kl_coef=0.05, importance_cap=2.0),
            temperature=0.8,
            micro_batch_tokens=budget,
            activation_checkpointing="selective",
        )
        ours.freeze_reference()
        with Looked() as seen:
            ours.grpo_backward(repeating(), torch.arange(4.0, device="cuda"))
            ours.step(1e-4)
            ours.seqkd_backward(repeating())
            ours.step(1e-4)
    assert not seen.found, seen.found
    assert known(seen.ops) and seen.ops["aten::embedding_dense_backward"] and seen.ops["gadcore::take_rows_backward"]


def test_of_the_discriminator(tmp_path) -> None:
    save_tiny(tmp_path, "llama")
    # Not one of tests.support.builders, which has been made ready for a CPU.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    with gpu(MEMORY):
        d = Discriminator(
            model.to("cuda"),
            TEMPLATE,
            DiscriminatorSettings(),
            same_vocabulary=True,
            micro_batch_tokens=40,
            activation_checkpointing="off",
        )
        with Looked() as seen:
            d.score(repeating(), backward=True)
            d.step(1e-4)
    assert not seen.found, seen.found
    assert known(seen.ops) and seen.ops["gadcore::bt_score_backward"]
