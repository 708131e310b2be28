"""Three steps of GAD in TRL on a real model, as a program that may be killed: MODEL FOLDER [resume].

Rows are those that come with gadcore. Writes log.json, the trainer's log without times, when it is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

from gadcore import Discriminator, DiscriminatorSettings
from gadcore.integrations.trl import GADGRPOTrainer, GADReward
from gadcore.models.spec import ModelSpec
from tests.support.runs import ROOT


def main(model: str, folder: str, *resume: str) -> None:
    path = ModelSpec.resolve(model).path
    lines = (ROOT / "gadcore/data/builtin/train.jsonl").read_text().splitlines()[:6]
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "teacher_response": row["teacher_response"]}
        for row in map(json.loads, lines)
    ]
    reward = GADReward(Discriminator.load(model, DiscriminatorSettings(lr=2e-5), device="cpu", seed=3))
    settings = GRPOConfig(
        folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.001, temperature=0.8, learning_rate=1e-5,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=24, max_steps=3, save_steps=1,
        logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        model_init_kwargs=dict(dtype="float32", attn_implementation="sdpa"), optim="adamw_torch_fused",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    trainer = GADGRPOTrainer(
        path, [reward], settings, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[reward]
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    log = [{k: v for k, v in e.items() if "time" not in k and "second" not in k} for e in trainer.state.log_history]
    (Path(folder) / "log.json").write_text(json.dumps(log[:3], indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
