"""GAD inside TRL: python examples/trl_gad.py MODEL ROWS.jsonl

A row is {"prompt": .., "teacher_response": ..}; the prompt is text or chat messages. The warmup teaches the student the
teacher's text and the discriminator to tell the two apart, GRPO then trains the student on the discriminator's scores.
"""

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, SFTConfig

from gadcore import Discriminator, DiscriminatorSettings
from gadcore.integrations.trl import GADGRPOTrainer, GADReward, GADWarmup

model, rows = sys.argv[1:]
data = Dataset.from_json(rows)
if isinstance(data[0]["prompt"], str):  # as a user's turn, so that the chat template is used
    data = data.map(lambda row: {"chat": [{"role": "user", "content": row["prompt"]}]}, remove_columns="prompt")
    data = data.rename_column("chat", "prompt")
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
discriminator = Discriminator.load(model, DiscriminatorSettings(lr=2e-5))
common = dict(report_to="none", logging_steps=1, save_strategy="no", gradient_checkpointing=False, bf16=False)

settings = SFTConfig("runs/trl/warmup", max_steps=8, learning_rate=5e-5, **common)
warm = GADWarmup(
    model=model, args=settings, train_dataset=data, processing_class=tokenizer,
    discriminator=discriminator, samples=4, prompts_per_step=4, max_completion_length=64,
)  # fmt: skip
warm.train()
warm.save_model("runs/trl/warm")

reward = GADReward(discriminator)
grpo = dict(max_steps=8, learning_rate=1e-5, beta=0.001, temperature=0.8, max_completion_length=64)
settings = GRPOConfig("runs/trl/gad", num_generations=4, per_device_train_batch_size=16, **grpo, **common)
trainer = GADGRPOTrainer("runs/trl/warm", [reward], settings, data, processing_class=tokenizer, callbacks=[reward])
trainer.train()
trainer.save_model("runs/trl/student")
discriminator.save("runs/trl/discriminator")
