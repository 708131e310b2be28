"""GAD by TRL with GADReward and by gadcore itself: equal weights and samples give equal figures, step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from gadcore import AlgorithmSettings, Discriminator, DiscriminatorSettings, Group, Student, StudentSettings
from gadcore.data.groups import Prompt, Response
from gadcore.integrations.trl import GADGRPOTrainer, GADReward
from gadcore.models.loading import load_causal_lm
from gadcore.models.spec import ModelSpec
from tests.support.tiny import save_tiny
from tests.support.trl_trainers import ROWS, make, replayed

TEMPERATURE, BETA, SAMPLES, LR = 0.8, 0.05, 4, 0.05
Step = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), tied=False)


def discriminator(model: Path) -> Discriminator:
    return Discriminator.load(str(model), DiscriminatorSettings(lr=1e-3), device="cpu", seed=3)


class Watch(TrainerCallback):
    """What every optimizer step of a trainer was made of."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[Step] = []
        self.loss = 0.0

    def follow(self, trainer: GRPOTrainer) -> None:
        self.trainer, compute = trainer, trainer._compute_loss

        def summed(*arguments: Any) -> torch.Tensor:
            loss = compute(*arguments)
            self.loss += loss.item()
            return loss

        trainer._compute_loss = summed  # type: ignore[method-assign]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trl, batches = self.trainer, self.trainer._buffered_inputs
        rewards = trl._logs["rewards"]["discriminator"]
        self.steps.append(
            {
                "loss": self.loss,
                "rewards": list(rewards),
                "advantages": sorted(x for batch in batches for x in batch["advantages"].tolist()),
                "d_loss": trl._metrics["train"]["discriminator/loss"][-1],
                "gradient": {n: p.grad.clone() for n, p in trl.model.named_parameters()},
            }
        )
        self.loss = 0.0


def by_trl(kind: type[GRPOTrainer], model: Path, folder: Path) -> tuple[list[Step], Any]:
    reward, watch = GADReward(discriminator(model)), Watch()
    trl = make(
        kind,
        model,
        folder,
        reward_funcs=[reward],
        callbacks=[reward, watch],
        rollout_func=replayed,
        shuffle_dataset=False,
        beta=BETA,
        use_bias_correction_kl=False,
        loss_type="dapo",
        gradient_accumulation_steps=2,
        num_generations=SAMPLES,
        temperature=TEMPERATURE,
        optim="sgd",
        learning_rate=LR,
        max_grad_norm=1e9,
        max_steps=3,
    )
    watch.follow(trl)
    trl.train()
    return watch.steps, trl.model


def groups_of(spec: ModelSpec, trl: GRPOTrainer, rows: list[dict[str, Any]]) -> list[Group]:
    drawn = replayed([row["prompt"] for row in rows for _ in range(SAMPLES)], trl)
    groups = []
    for i, row in enumerate(rows):
        ids = drawn["completion_ids"][SAMPLES * i : SAMPLES * (i + 1)]
        teacher = Response(
            row["teacher_response"], spec.template.response_ids(row["teacher_response"], finished=True), True
        )
        samples = []
        for own in ids:
            text, finished = spec.template.text_of(own)
            samples.append(Response(text, tuple(own), finished, (0.0,) * len(own)))
        messages = tuple(row["prompt"])
        groups.append(Group(Prompt(i, messages, spec.template.prompt_ids(messages)), teacher, samples))
    return groups


def by_gadcore(model: Path, trl: GRPOTrainer) -> tuple[list[Step], Any]:
    spec = ModelSpec.resolve(str(model))
    policy = load_causal_lm(spec.path, "float32", torch.device("cpu"))
    student = Student.wrap(
        policy,
        spec.tokenizer,
        StudentSettings(grad_clip=1e9),
        # TRL's floor under the deviation of a group's rewards.
        AlgorithmSettings(kl_coef=BETA, clip_low=0.2, clip_high=0.2, advantage_std_floor=1e-4),
        optimizer=torch.optim.SGD(policy.parameters(), lr=LR),
        temperature=TEMPERATURE,
    )
    d = discriminator(model)
    student.freeze_reference()
    steps: list[Step] = []
    for step in range(3):
        batch = groups_of(spec, trl, [ROWS[i % 4] for i in (2 * step, 2 * step + 1)])
        scores = d.update(batch)
        stats = student.grpo_backward(batch, scores.sample_scores)
        steps.append(
            {
                "loss": stats.loss,
                "rewards": [r for group in scores.rewards for r in group],
                "advantages": sorted(student.advantages(scores.rewards, [SAMPLES] * 2).tolist()),
                "d_loss": scores.loss,
                "gradient": {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None},
            }
        )
        student.step()
    return steps, policy


@pytest.mark.parametrize("kind", [GRPOTrainer, GADGRPOTrainer])
def test_three_steps_are_those_of_gadcore(kind: type[GRPOTrainer], model: Path, tmp_path: Path) -> None:
    found, theirs = by_trl(kind, model, tmp_path)
    expected, ours = by_gadcore(model, make(GRPOTrainer, model, tmp_path))
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "rewards", "advantages", "d_loss"):
            # Rewards are of the order of 1; TRL keeps them in float32.
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key
        assert a["gradient"].keys() == b["gradient"].keys()
        norm = torch.cat([g.flatten() for g in b["gradient"].values()]).norm()
        assert norm > 1e-3
        for name, gradient in b["gradient"].items():
            assert (a["gradient"][name] - gradient).norm() <= 1e-5 * norm, name
    moved = load_causal_lm(str(model), "float32", torch.device("cpu"))
    for p, q, before in zip(theirs.parameters(), ours.parameters(), moved.parameters(), strict=True):
        assert (p - q).norm() <= 1e-4 * (q - before).norm() + 1e-8
