"""GADWarmup: SeqKD as TRL's SFTTrainer has it, the discriminator beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gadcore import Discriminator, DiscriminatorSettings
from gadcore.errors import UserError
from gadcore.integrations.trl import GADWarmup
from tests.support.tiny import save_tiny
from tests.support.trl_trainers import ROWS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def settings(folder: Path, **changes: Any) -> SFTConfig:
    given: dict[str, Any] = dict(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=4,
        logging_steps=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return SFTConfig(str(folder), **given | changes)


def warmup(model: Path, folder: Path, **changes: Any) -> GADWarmup:
    d = Discriminator.load(str(model), DiscriminatorSettings(lr=1e-2), device="cpu", seed=3)
    return GADWarmup(
        model=str(model),
        args=settings(folder, **changes),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(model),
        discriminator=d,
        samples=4,
        prompts_per_step=2,
        max_completion_length=4,
    )


def test_the_student_is_that_of_sft_and_the_discriminator_learns(model: Path, tmp_path: Path) -> None:
    warm = warmup(model, tmp_path / "ours", max_steps=8)
    warm.train()
    rows = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["teacher_response"]}]}
        for row in ROWS
    ]
    alone = SFTTrainer(
        str(model),
        settings(tmp_path / "trl", max_steps=8),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    alone.train()
    for p, q in zip(warm.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(p, q)
    log = [entry for entry in warm.state.log_history if "discriminator/loss" in entry]
    assert len(log) == 4 and all(entry["discriminator/grad_norm"] > 0 for entry in log)
    assert log[-1]["discriminator/loss"] < log[0]["discriminator/loss"] - 0.1
    assert log[-1]["discriminator/accuracy"] > 0.8


def test_a_killed_warmup_goes_on_to_the_bit(model: Path, tmp_path: Path) -> None:
    whole = warmup(model, tmp_path / "whole")
    whole.train()
    warmup(model, tmp_path / "cut", max_steps=2).train()
    cut = warmup(model, tmp_path / "cut")
    cut.train(resume_from_checkpoint=True)
    one, other = (warm._beside.discriminator.state_dict() for warm in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for p, q in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rows_without_a_teacher_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'prompt' and 'teacher_response'"):
        GADWarmup(
            str(model), settings(tmp_path), train_dataset=Dataset.from_list([{"prompt": "x"}]), discriminator=None
        )
