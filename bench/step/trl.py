"""GAD on TRL's GRPOTrainer, set up as well as it can be by hand.

TRL 1.16 as it comes, with the settings that are fair to it on a CPU: bf16 and gradient checkpointing are off (both are
on by default), fp32, sdpa, fused AdamW, no log-probs for an old policy (one optimizer step a batch). Its sampler is
transformers' generate(), which is what it uses on a CPU. Its reward function scores the samples with D in a pass of its
own, without gradients; D is then trained on the samples and the teacher's response, which is scored once a group.

loss_type "dapo" is the mean over all tokens, as in gadcore. TRL adds 1e-4 to the deviation of a group's rewards, where
gadcore adds 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.step.literal import load_discriminator
from bench.step.problem import Problem
from bench.step.worker import Arguments, Channel, Clock, Meter, arguments, gradients_of, write_findings
from gadcore.models.loading import load_tokenizer

# Added to the standard deviation in TRL's advantages.
EPSILON = 1e-4


class ByHand:
    """The discriminator beside the trainer: TRL's reward function, which also takes D's Bradley-Terry step."""

    __name__ = "discriminator"

    def __init__(self, problem: Problem, clock: Clock) -> None:
        self.problem, self.clock = problem, clock
        self.settings = problem.config().discriminator
        self.model = load_discriminator(problem, torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.lr,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        self.rows = {row["index"]: row for row in problem.groups}
        self.keep_gradients = False
        self.found: dict[str, Any] = {}

    def __call__(self, completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        """Rewards of the samples; index: the prompt of each, N in a row of the same."""
        n = self.problem.samples
        groups = [(self.rows[index[i]], completion_ids[i : i + n]) for i in range(0, len(index), n)]
        size = self.problem.groups_at_once
        at_once = [groups[i : i + size] for i in range(0, len(groups), size)]
        with self.clock("discriminator score"), torch.no_grad():
            rewards = torch.cat([self._scores(cut, teacher=False).flatten() for cut in at_once]).tolist()
        loss = 0.0
        with self.clock("discriminator train"):
            for cut in at_once:
                scores = self._scores(cut, teacher=True)
                part = F.softplus(scores[:, 1:] - scores[:, :1]).sum() / len(completion_ids)
                part.backward()
                loss += part.item()
        if self.keep_gradients:
            self.found = self._findings(groups, rewards, loss)
        with self.clock("optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return rewards

    def _scores(self, groups: Sequence[tuple[dict[str, Any], list[list[int]]]], *, teacher: bool) -> Tensor:
        """[groups, N], or [groups, 1 + N] with the teacher's in front.

        Rows are padded on the right, where causal attention does not look: no mask is needed.
        """
        rows = [
            [*row["prompt_ids"], *response]
            for row, samples in groups
            for response in ([row["teacher_ids"]] if teacher else []) + samples
        ]
        longest = max(map(len, rows))
        pad_id = self.model.config.pad_token_id
        input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head: nn.Linear = self.model.score  # type: ignore[assignment]
        return head(hidden[torch.arange(len(rows)), last]).view(len(groups), -1)

    def _findings(
        self, groups: Sequence[tuple[dict[str, Any], list[list[int]]]], rewards: list[float], loss: float
    ) -> dict[str, Any]:
        n = self.problem.samples
        return {
            "groups": [
                {
                    "prompt": row["prompt_ids"],
                    "samples": samples,
                    "d_prompt": row["prompt_ids"],
                    "d_responses": [row["teacher_ids"], *samples],
                }
                for row, samples in groups
            ],
            "rewards": [rewards[i : i + n] for i in range(0, len(rewards), n)],
            "loss": loss,
            "gradients": gradients_of(self.model),
        }


def trainer_arguments(problem: Problem, folder: Path) -> GRPOConfig:
    config = problem.config()
    rows, student, template = problem.groups_at_once * problem.samples, config.student, problem.template()
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        model_init_kwargs=dict(dtype="float32", attn_implementation="sdpa"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=problem.prompts // problem.groups_at_once,
        num_generations=problem.samples,
        num_iterations=1,
        max_completion_length=problem.max_response,
        generation_kwargs=dict(suppress_tokens=[template.end_id]) if problem.forced else None,
        temperature=problem.temperature,
        beta=config.algorithm.kl_coef,
        epsilon=config.algorithm.clip_low,
        epsilon_high=config.algorithm.clip_high,
        loss_type="dapo",
        optim="adamw_torch_fused",
        learning_rate=student.lr,
        lr_scheduler_type="constant",
        adam_beta1=student.betas[0],
        adam_beta2=student.betas[1],
        weight_decay=student.weight_decay,
        max_grad_norm=student.grad_clip,
        max_steps=problem.steps,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
    )


class Turns(TrainerCallback):
    """Every optimizer step waits for the suite, and answers when it is done."""

    def __init__(self, channel: Channel, meter: Meter, given: Arguments, by_hand: ByHand) -> None:
        self.channel, self.meter, self.given, self.by_hand = channel, meter, given, by_hand
        self.checked = False
        self.policy_loss = 0.0
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        command = self.channel.wait()
        if not command:
            raise Ended
        self.checked = self.by_hand.keep_gradients = command == "check"
        self.policy_loss = 0.0
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = self.trainer._metrics["train"]["completions/mean_length"][-1] * self.given.problem.samples
        self.channel.tell({**self.meter.end(), "response_tokens": round(tokens * self.given.problem.prompts)})
        self.by_hand.found = {}


class Ended(Exception):
    """The suite wants no more steps."""


def build(given: Arguments, clock: Clock, turns: Turns, by_hand: ByHand) -> GRPOTrainer:
    problem = given.problem
    rows = [{"prompt": row["messages"], "index": row["index"]} for row in problem.groups]
    trainer = GRPOTrainer(
        model=problem.student,
        reward_funcs=by_hand,  # type: ignore[arg-type]
        args=trainer_arguments(problem, given.findings.parent / "trl"),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(problem.student),
        callbacks=[turns],
    )
    turns.trainer = trainer
    prompt_ids, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows])
    if [list(ids) for ids in prompt_ids] != [row["prompt_ids"] for row in problem.groups]:
        raise RuntimeError("TRL's prompts differ from gadcore's")
    clock.wrap(trainer, "training_step", lambda *_, **__: "policy")
    clock.wrap(trainer, "_generate_and_score_completions", lambda *_: "other")
    clock.wrap(trainer, "_generate_single_turn", lambda *_: "generate")
    clock.wrap(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda model, *_, **__: "reference" if model is trainer.ref_model else "policy",
    )
    return trainer


def observe(trainer: GRPOTrainer, clock: Clock, turns: Turns) -> None:
    """Clipping and step on the clock, findings taken before the gradient is clipped, losses summed over a step."""
    clip = trainer.accelerator.clip_grad_norm_
    loss = trainer._compute_loss

    def clipped(*args: Any, **kwargs: Any) -> Any:
        if turns.checked:
            found = turns.by_hand.found
            write_findings(
                turns.given.findings,
                groups=found["groups"],
                rewards=found["rewards"],
                losses={"policy": turns.policy_loss, "discriminator": found["loss"]},
                student=trainer.accelerator.unwrap_model(trainer.model),
                discriminator=found["gradients"],
                epsilon=EPSILON,
            )
        with clock("optimizer"):
            return clip(*args, **kwargs)

    def summed(*args: Any, **kwargs: Any) -> Any:
        value = loss(*args, **kwargs)
        turns.policy_loss += value.item()
        return value

    create = trainer.create_optimizer

    def created(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        clock.wrap(optimizer, "step", lambda *_, **__: "optimizer")
        return optimizer

    for owner, method, outer in (
        (trainer.accelerator, "clip_grad_norm_", clipped),
        (trainer, "_compute_loss", summed),
        (trainer, "create_optimizer", created),
    ):
        setattr(owner, method, outer)


def main() -> None:
    channel, given, clock = Channel(), arguments(), Clock()
    by_hand = ByHand(given.problem, clock)
    turns = Turns(channel, None, given, by_hand)  # type: ignore[arg-type]
    trainer = build(given, clock, turns, by_hand)
    observe(trainer, clock, turns)
    turns.meter = Meter(clock, given.threads, trainer.model, trainer.ref_model, by_hand.model)  # type: ignore[arg-type]
    channel.tell({"ready": True})
    try:
        trainer.train()
    except Ended:
        return


if __name__ == "__main__":
    main()
