"""GADWarmup: the stage before GAD, by TRL's SFTTrainer.

The student learns the teacher's text by cross-entropy (SeqKD); at every step the discriminator learns to tell samples
of the student, as it is then, from the teacher's responses.

    warm = GADWarmup(model="my-model", args=SFTConfig(..), train_dataset=rows, discriminator=d)
    warm.train()
    warm.save_model("warm")        # GRPOTrainer(model="warm"): its reference policy is then the warm student
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl import SFTTrainer

from gadcore.errors import UserError
from gadcore.integrations.trl.checkpoint import Checkpointed
from gadcore.integrations.trl.rows import Prompt, SampleTexts, end_ids_of
from gadcore.integrations.trl.update import FIGURES, Update, gathered, ranks
from gadcore.models.discriminator import Discriminator


class GADWarmup(SFTTrainer):
    """Takes what SFTTrainer takes, with rows of GRPOTrainer: prompt and the teacher's text in `teacher_column`.

    discriminator: trained by one step of Bradley-Terry beside every step of the student, on `samples` samples of each
    of prompts_per_step prompts, in an order of their own by the arguments' seed. Its figures are in the trainer's log
    as discriminator/loss, accuracy, margin and grad_norm, those since the last entry averaged; its state is in the
    trainer's checkpoints. max_completion_length: tokens at which a sample is cut. resume_from: as of GADReward.
    """

    # PreTrainedModel, which TRL's base class knows as less.
    model: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        discriminator: Discriminator,
        train_dataset: Dataset,
        teacher_column: str = "teacher_response",
        samples: int = 8,
        prompts_per_step: int = 8,
        max_completion_length: int = 512,
        temperature: float = 0.8,
        resume_from: str | Path | None = None,
        callbacks: Sequence[Any] | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(train_dataset, Dataset) or not {"prompt", teacher_column} <= set(train_dataset.column_names):
            raise UserError(f"GADWarmup needs a Dataset with the columns 'prompt' and {teacher_column!r}")
        rows = [(row["prompt"], row[teacher_column]) for row in train_dataset]
        beside = _BesideTheStudent(
            discriminator, rows, samples, prompts_per_step, max_completion_length, temperature, resume_from
        )
        self._beside = beside
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([_completed(prompt, teacher) for prompt, teacher in rows]),
            callbacks=[*(callbacks or ()), beside],
            **settings,
        )

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        super().log(logs | self._beside.figures() if self.model.training else logs, *arguments)


class _BesideTheStudent(Checkpointed):
    def __init__(
        self,
        discriminator: Discriminator,
        rows: Sequence[tuple[Prompt, str]],
        samples: int,
        prompts: int,
        length: int,
        temperature: float,
        resume_from: str | Path | None,
    ) -> None:
        super().__init__(discriminator, resume_from)
        self.rows, self.samples, self.prompts = rows, samples, min(prompts, len(rows))
        self.length, self.temperature = length, temperature
        self._update = Update(discriminator)
        self._found: list[dict[str, float]] = []

    def figures(self) -> dict[str, float]:
        """Means since the last call."""
        found, self._found = self._found, []
        return {
            f"discriminator/{name}": sum(f[name] for f in found) / len(found)
            for name in (*FIGURES, "grad_norm")
            if found
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, tokenizer = kwargs["model"], kwargs["processing_class"]
        chosen = [self.rows[i] for i in self._chosen(args.seed, state.global_step)]
        rank, size = ranks()
        texts = SampleTexts(tokenizer, end_ids_of(model, tokenizer))
        devices = [model.device] if model.device.type == "cuda" else []
        # The student's own order and dropout do not depend on what is drawn here.
        with torch.random.fork_rng(devices):
            torch.manual_seed(hash((args.seed, state.global_step, rank)) % 2**63)
            drawn = {i: self._drawn(model, tokenizer, chosen[i][0], texts) for i in range(rank, len(chosen), size)}
        everyone = {i: samples for share in gathered(drawn) for i, samples in share.items()}
        groups = []
        for i, (prompt, teacher) in enumerate(chosen):
            own, finished = zip(*everyone[i], strict=True)
            groups.append(self.discriminator.group(prompt, teacher, own, finished))
        with torch.enable_grad():
            found = self._update.add(groups, backward=True)
            self._found.append(found.figures | {"grad_norm": self._update.step()})

    def _chosen(self, seed: int, step: int) -> Iterator[int]:
        """Rows of a step, in an order that is shuffled anew every time that all of them had their turn."""
        for place in range(step * self.prompts, (step + 1) * self.prompts):
            turn, index = divmod(place, len(self.rows))
            yield random.Random(f"{seed} {turn}").sample(range(len(self.rows)), len(self.rows))[index]

    @torch.no_grad()
    def _drawn(self, model: Any, tokenizer: Any, prompt: Prompt, texts: SampleTexts) -> list[tuple[str, bool]]:
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        end_ids = sorted(texts.end_ids)
        settings = GenerationConfig(
            max_new_tokens=self.length,
            do_sample=True,
            temperature=self.temperature,
            # All that a model's own settings could narrow.
            top_k=model.config.get_text_config().vocab_size,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
            num_return_sequences=self.samples,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
        )
        training = model.training
        model.eval()
        given = torch.tensor([ids], device=model.device)
        out = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
        model.train(training)
        found = []
        for row in out[:, given.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in texts.end_ids), None)
            found.append(texts(row if end is None else row[: end + 1]))
        return found


def _completed(prompt: Prompt, teacher: str) -> dict[str, Any]:
    """A row as SFTTrainer takes it."""
    completion = teacher if isinstance(prompt, str) else [{"role": "assistant", "content": teacher}]
    return {"prompt": prompt, "completion": completion}
