"""TRL's trainers on a tiny model, and batches as they reach their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

ROWS = [
    {"prompt": [{"role": "user", "content": text}], "teacher_response": answer}
    for text, answer in (
        ("Name the capital of France.", "The capital of France is Paris."),
        ("When does water boil?", "At one hundred degrees."),
        ("Write a short answer.", "Short."),
        ("Where is the Seine?", "In Paris, a city of France, on a short way to the sea."),
    )
]


def settings(folder: Path, **changes: Any) -> GRPOConfig:
    given: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs=dict(dtype="float32", attn_implementation="sdpa"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        temperature=0.8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=2,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return GRPOConfig(**given | changes)


def no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(len(str(completion)) % 5) for completion in completions]


def make(
    kind: Callable[..., GRPOTrainer], model: Path, folder: Path, *, rows: Any = None, **changes: Any
) -> GRPOTrainer:
    """A trainer of `kind` on the model directory. changes: of its GRPOConfig, or its own arguments."""
    own = {key: changes.pop(key) for key in list(changes) if key in OWN}
    return kind(
        model=str(model),
        args=settings(folder, **changes),
        train_dataset=Dataset.from_list(rows or ROWS),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        **dict(reward_funcs=no_reward) | own,
    )


OWN = ("reward_funcs", "callbacks", "eval_dataset", "rollout_func", "fuse", "whole_groups")


def batch(vocabulary: int, *, samples: int = 4, prompts: int = 2, seed: int = 0, drift: float = 0.3) -> dict[str, Any]:
    """Inputs of _compute_loss: `prompts` ragged prompts with `samples` ragged completions each, all masks of one kind
    or another, log-probabilities of an old and of a reference policy."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = prompts * samples
    longest, width = 7, 6
    prompt_lengths = integers(2, longest + 1, prompts).repeat_interleave(samples)
    lengths = integers(1, width + 1, rows)
    lengths[1] = width
    prompt_mask = (torch.arange(longest) >= longest - prompt_lengths[:, None]).long()
    mask = (torch.arange(width) < lengths[:, None]).long()
    prompt_ids = integers(3, vocabulary, prompts, longest).repeat_interleave(samples, 0)
    noise = torch.randn(3, rows, width, generator=generator) * drift
    return {
        "prompt_ids": torch.where(prompt_mask.bool(), prompt_ids, 2),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.where(mask.bool(), integers(3, vocabulary, rows, width), 2),
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": mask.sum() + 11,
        "noise": noise,
    }


def replayed(prompts: Sequence[Any], trainer: GRPOTrainer) -> dict[str, Any]:
    """A rollout function whose samples depend on the prompt and on their place in the group alone: what is drawn does
    not depend on how TRL cuts its batches, or on ranks. Some end by themselves, some are cut."""
    tokenizer = trainer.processing_class
    prompt_ids = trainer._tokenize_prompts(prompts)[0]
    before = trainer.accelerator.process_index * len(prompts)
    completions = []
    for row, ids in enumerate(prompt_ids, before):
        n = row % trainer.num_generations
        generator = torch.Generator().manual_seed(sum(ids) * 31 + n)
        length = 2 + n % 4
        drawn = torch.randint(3, len(tokenizer), (length,), generator=generator).tolist()
        completions.append(drawn + [tokenizer.eos_token_id] * (n % 2))
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}
