"""GADReward inside TRL's GRPOTrainer: what trains the discriminator, when, and how a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from gadcore import Discriminator, DiscriminatorSettings
from gadcore.errors import UserError
from gadcore.integrations.trl import GADReward
from tests.support.tiny import save_tiny
from tests.support.trl_trainers import ROWS, make, replayed

FIGURES = ("loss", "accuracy", "margin", "teacher_score", "sample_score")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def discriminator(model: Path) -> Discriminator:
    return Discriminator.load(str(model), DiscriminatorSettings(lr=1e-3), device="cpu", seed=3)


def trainer(model: Path, folder: Path, reward: GADReward, **changes: Any) -> GRPOTrainer:
    given: dict[str, Any] = dict(reward_funcs=[reward], callbacks=[reward], shuffle_dataset=False)
    return make(GRPOTrainer, model, folder, **given | changes)


def weights(reward: GADReward) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reward.discriminator.state_dict().items()}


def seen(reward: GADReward) -> list[Any]:
    """The calls of reward.discriminator.score() that train, as texts; filled while the trainer runs."""
    calls: list[Any] = []
    score = reward.discriminator.score

    def watched(groups: Any, *, backward: bool) -> Any:
        calls.append((backward, [(g.prompt.messages[-1]["content"], [s.text for s in g.samples]) for g in groups]))
        return score(groups, backward=backward)

    reward.discriminator.score = watched  # type: ignore[method-assign]
    return calls


# per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, num_iterations, optimizer steps in
# which TRL goes through four prompts with four samples each; two prompts a step of the discriminator throughout.
SCHEDULES = {
    "a call a step": dict(per_device_train_batch_size=8, max_steps=2),
    "a group a micro-batch": dict(gradient_accumulation_steps=2, max_steps=2),
    "half a group a micro-batch": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2),
    "two calls a step": dict(gradient_accumulation_steps=2, steps_per_generation=1, max_steps=2),
    "a call for two steps": dict(per_device_train_batch_size=8, steps_per_generation=2, max_steps=2),
    "every batch twice": dict(per_device_train_batch_size=8, num_iterations=2, max_steps=4),
    "all": dict(gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=3, max_steps=6),
}


@pytest.fixture(scope="module")
def by_hand(model: Path) -> tuple[dict[str, Tensor], list[list[float]]]:
    """(D's state, rewards by prompt) after the four prompts, two a step, without TRL's trainer."""
    d = discriminator(model)
    trl = make(GRPOTrainer, model, model.parent)
    prompts = [row["prompt"] for row in ROWS for _ in range(4)]
    ids = replayed(prompts, trl)["completion_ids"]
    end = trl.processing_class.eos_token_id
    groups = []
    for i, row in enumerate(ROWS):
        samples = ids[4 * i : 4 * i + 4]
        finished = [sample[-1] == end for sample in samples]
        texts = [trl.processing_class.decode(s[:-1] if f else s) for s, f in zip(samples, finished, strict=True)]
        groups.append(d.group(row["prompt"], row["teacher_response"], texts, finished))
    rewards = [*d.update(groups[:2]).rewards, *d.update(groups[2:]).rewards]
    return d.state_dict(), rewards


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_group_trains_once_whatever_trl_brings_at_once(
    name: str, model: Path, tmp_path: Path, by_hand: Any
) -> None:
    reward = GADReward(discriminator(model))
    calls = seen(reward)
    trl = trainer(model, tmp_path, reward, rollout_func=replayed, **SCHEDULES[name])
    trl.train()

    assert all(backward for backward, _ in calls)
    texts = [group for _, groups in calls for group in groups]
    assert [prompt for prompt, _ in texts] == [row["prompt"][0]["content"] for row in ROWS]
    assert all(len(samples) == 4 for _, samples in texts)
    assert reward.updates == 2
    state, rewards = by_hand
    # A batch of two calls is a sum in another order.
    tolerance = dict(rtol=1e-4, atol=1e-7) if name == "two calls a step" else dict(rtol=0, atol=0)
    for key, value in reward.discriminator.state_dict().items():
        torch.testing.assert_close(value, state[key], **tolerance)
    got = [v for entry in trl.state.log_history for k, v in entry.items() if k == "rewards/discriminator/mean"]
    flat = [r for group in rewards for r in group]
    if len(got) == 2:
        halves = [sum(flat[:8]) / 8, sum(flat[8:]) / 8]
        assert got == pytest.approx(halves, rel=1e-5)


def test_the_log_has_the_discriminators_figures_and_evaluation_does_not_train(model: Path, tmp_path: Path) -> None:
    reward = GADReward(discriminator(model))
    trl = trainer(model, tmp_path, reward, eval_dataset=Dataset.from_list(ROWS[:2]), per_device_eval_batch_size=8)
    before = weights(reward)
    told = trl.evaluate()
    assert all(torch.equal(value, before[key]) for key, value in weights(reward).items())
    assert {f"eval_discriminator/{name}" for name in FIGURES} <= told.keys()
    assert "eval_discriminator/grad_norm" not in told
    trl.train()
    first = trl.state.log_history[1]
    assert {f"discriminator/{name}" for name in (*FIGURES, "grad_norm")} <= first.keys()
    assert first["discriminator/sample_score"] == pytest.approx(first["rewards/discriminator/mean"], rel=1e-5)
    assert any(not torch.equal(value, before[key]) for key, value in weights(reward).items() if key in before)


def test_frozen_it_scores_alone(model: Path, tmp_path: Path) -> None:
    reward = GADReward(discriminator(model), frozen=True)
    before = weights(reward)
    trainer(model, tmp_path, reward).train()
    assert all(torch.equal(value, before[key]) for key, value in weights(reward).items())
    assert reward.updates == 0


def test_a_killed_run_goes_on_to_the_bit(model: Path, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, **resume: Any) -> tuple[list[dict[str, float]], dict[str, Tensor], Any]:
        reward = GADReward(discriminator(model))
        trl = trainer(model, folder, reward, max_steps=steps, save_strategy="steps", save_steps=2)
        trl.train(**resume)
        log = [{k: v for k, v in e.items() if "time" not in k and "second" not in k} for e in trl.state.log_history]
        return log[:4], weights(reward), trl.model.state_dict()

    whole, whole_d, whole_g = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed, resumed_d, resumed_g = run(tmp_path / "cut", 4, resume_from_checkpoint=True)

    assert resumed == whole
    for one, other in ((whole_d, resumed_d), (whole_g, resumed_g)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    moments = [key for key in whole_d if key.startswith("optimizer.")]
    assert moments

    (tmp_path / "cut" / "checkpoint-4" / "discriminator-state.safetensors").unlink()
    with pytest.raises(UserError, match="checkpoint-4 has no discriminator-state"):
        run(tmp_path / "cut", 6, resume_from_checkpoint=True)


BAD = {
    "no column 'teacher_response'": dict(rows=[{"prompt": "Where?"}] * 4),
    "must hold the teacher's text": dict(rows=[ROWS[0] | {"teacher_response": ""}] * 4),
    "set groups_per_update of GADReward to a divisor": dict(groups=3, per_device_train_batch_size=8),
    "no whole groups": dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, steps_per_generation=2),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_cannot_be_is_refused_in_a_sentence(sentence: str, model: Path, tmp_path: Path) -> None:
    changes = dict(BAD[sentence])
    reward = GADReward(discriminator(model), groups_per_update=changes.pop("groups", None))
    with pytest.raises(UserError, match=sentence):
        trainer(model, tmp_path, reward, **changes).train()


def test_it_must_be_a_callback_too(model: Path, tmp_path: Path) -> None:
    reward = GADReward(discriminator(model))
    with pytest.raises(UserError, match=r"callbacks=\[reward\]"):
        trainer(model, tmp_path, reward, callbacks=[]).train()


def test_plain_prompts_and_a_tokenizer_without_template(model: Path, tmp_path: Path) -> None:
    from gadcore.integrations.trl.rows import SampleTexts
    from tests.support.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    ids = tokenizer("Paris, a city").input_ids
    shown = SampleTexts(tokenizer, [2])
    assert shown([*ids, 2]) == ("Paris, a city", True)
    assert shown(ids) == ("Paris, a city", False)
    # Special tokens in the middle stay to be seen.
    assert shown([*ids, 2, *ids]) == ("Paris, a city<|im_end|>Paris, a city", False)
    # A marker that is not the template's ends a response as well.
    assert SampleTexts(tokenizer, [0, 2])([*ids, 0]) == ("Paris, a city", True)
    tokenizer.chat_template = None
    assert SampleTexts(tokenizer, [2])([*ids, 2]) == ("Paris, a city", True)

    reward = GADReward(discriminator(model))
    calls = seen(reward)
    rows = [{"prompt": row["prompt"][0]["content"], "teacher_response": row["teacher_response"]} for row in ROWS]
    trainer(model, tmp_path, reward, rows=rows, max_steps=1).train()
    assert calls[0][1][0][0] == rows[0]["prompt"]
