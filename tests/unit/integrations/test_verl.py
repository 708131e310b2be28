"""The discriminator as verl's critic: the loss, and verl's own trainer with its workers and its queue replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from gadcore.integrations import text_rewards
from gadcore.integrations.verl.loss import WEIGHT, bt_loss, last_values, pairs_of
from tests.support import stacks
from tests.support.score_server import score_server

# (teacher's row, rows of the samples); row 5 fills the batch.
GROUPS = [(6, [0, 1, 4]), (7, [2, 3])]


def literal(scores: Tensor) -> Tensor:
    return torch.cat([softplus(-(scores[t] - scores[samples])) for t, samples in GROUPS]).mean()


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_coefficients_are_the_derivative_of_the_bt_loss() -> None:
    scores = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = pairs_of(scores, GROUPS)
    loss = literal(scores)
    loss.backward()
    torch.testing.assert_close(found.coefficients.double(), scores.grad, rtol=1e-6, atol=1e-8)
    assert found.loss == pytest.approx(loss.item()) and found.coefficients[5] == 0
    margins = torch.cat([scores[t] - scores[s] for t, s in GROUPS])
    assert found.margin == pytest.approx(margins.mean().item())
    assert found.accuracy == pytest.approx((margins > 0).double().mean().item())


@pytest.mark.parametrize("cut", [[8], [3, 5], [1] * 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_is_the_same_however_the_rows_are_cut(cut: list[int], ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 5, 4, 6, 3, 2, 7, 4]
    rows = [torch.randn(length, generator=generator, requires_grad=True) for length in lengths]
    scores = torch.stack([row[-1] for row in rows])
    literal(scores).backward()
    expected = [row.grad.clone() for row in rows]
    for row in rows:
        row.grad = None
    coefficients = pairs_of(scores, GROUPS).coefficients
    weights = [torch.cat([torch.zeros(length - 2), c[None]]) for length, c in zip(lengths, coefficients, strict=True)]
    begin = 0
    for size in cut:
        own = slice(begin, begin + size)
        begin += size
        data = {WEIGHT: nested([*weights[own]]), "dp_size": ranks}
        loss, _ = bt_loss({"values": nested(rows[own])}, data)
        # Of several ranks, the engine averages.
        (loss / ranks).backward()
    for row, gradient in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.grad, gradient, rtol=1e-5, atol=1e-7)


class Queue:
    """transfer_queue in this process, as far as the trainer asks."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any = None, tags: Any = None) -> Any:
        from transfer_queue import KVBatchMeta

        for name in fields.keys() if fields is not None else ():
            value = fields[name]
            for key, one in zip(keys, value.unbind() if isinstance(value, Tensor) else list(value), strict=True):
                self.rows.setdefault(key, {})[name] = one
        return KVBatchMeta(keys=keys, tags=tags or [{} for _ in keys], partition_id=partition_id, extra_info={})

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: Any = None) -> Any:
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        names = set.intersection(*(set(self.rows[key]) for key in keys)) if len(keys) > 1 else set(self.rows[keys[0]])
        chosen = [name for name in (select_fields or sorted(names)) if name in names]
        rows = [{name: self.rows[key][name] for name in chosen} for key in keys]
        found = list_of_dict_to_tensordict(rows)
        for name in chosen:
            # The queue hands out sequences as nested tensors, also where they are of one length.
            if isinstance(rows[0][name], Tensor) and rows[0][name].dim():
                found[name] = nested([row[name] for row in rows])
        return found

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            del self.rows[key]


class Critic(torch.nn.Module):
    """A worker group of two ranks with a value model of one layer."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.queue = torch.nn.Embedding(64, 1), queue
        self._dispatch_info = {"train": [0, 1]}
        self.loss: Any = None

    def values(self, keys: list[str]) -> Tensor:
        rows = [self.queue.rows[key]["input_ids"] for key in keys]
        return nested([torch.cumsum(self.embedding(row)[:, 0], 0) for row in rows])

    def infer_batch(self, batch: Any) -> Any:
        from verl.utils.tensordict_utils import get_tensordict

        assert batch.extra_info["compute_loss"] is False
        fields = get_tensordict({"values": self.values(batch.keys).detach()})
        self.queue.kv_batch_put(batch.keys, batch.partition_id, fields)
        return SimpleNamespace(futures=[])

    def train_mini_batch(self, batch: Any) -> Any:
        assert len(batch.keys) % 2 == 0 and batch.extra_info["mini_batch_size"] == len(batch.keys)
        half = len(batch.keys) // 2
        for keys in (batch.keys[:half], batch.keys[half:]):
            data = {WEIGHT: nested([self.queue.rows[key][WEIGHT] for key in keys]), "dp_size": 2}
            loss, _ = self.loss({"values": self.values(keys)}, data)
            (loss / 2).backward()
        return SimpleNamespace(get=lambda: {"metrics": {"loss": [0.0], "grad_norm": [1.0], "mfu": [0.1]}})


@pytest.mark.by_hand
@pytest.mark.skipif(not stacks.installed("verl"), reason="verl has an environment of its own")
def test_verls_trainer_with_the_discriminator_as_its_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo import padding_utils
    from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base

    from gadcore.integrations.verl import trainer as ours

    assert get_trainer_cls("gad") is ours.GADTrainer
    queue = Queue()
    for module in (trainer_base, padding_utils, ours):
        monkeypatch.setattr(module, "tq", queue)
    monkeypatch.setattr(ours.ray, "get", lambda futures: futures)
    gad = ours.GADTrainer.__new__(ours.GADTrainer)
    gad.config = OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": {"temperature": 0.8, "n": 2}},
            "critic": {"data_loader_seed": 1},
            "algorithm": {
                "use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0,
                "norm_adv_by_std_in_grpo": True,
            },
        }
    )  # fmt: skip
    gad.tokenizer = SimpleNamespace(eos_token_id=2)
    texts = {"in paris": [20, 21, 22], "yes": [30]}
    tokenizer = lambda text, add_special_tokens: {"input_ids": texts[text]}  # noqa: E731
    gad.tokenizer = type("T", (), {"eos_token_id": 2, "__call__": lambda self, *a, **k: tokenizer(*a, **k)})()
    gad.critic_wg = critic = Critic(queue)
    critic.loss = ours.bt_loss

    prompts = {"a": ("in paris", [5, 6, 7]), "b": ("yes", [8, 9])}
    responses = {"a": [[10, 11, 2], [12]], "b": [[13, 14, 15, 2], [16, 17]]}
    keys, tags = [], []
    for uid, (teacher, prompt) in prompts.items():
        for n, response in enumerate(responses[uid]):
            key = f"{uid}_{n}_0"
            mask = torch.ones(len(response), dtype=torch.int64)
            ids = torch.tensor(prompt + response)
            queue.rows[key] = {
                "uid": uid, "prompts": torch.tensor(prompt), "responses": torch.tensor(response), "input_ids": ids,
                "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(len(ids)), "response_mask": mask,
                "loss_mask": mask, "rm_scores": torch.zeros(len(response)),
                "rollout_log_probs": torch.zeros(len(response)), "old_log_probs": torch.zeros(len(response)),
                "reward_model": {"ground_truth": teacher}, "num_turns": 2,
            }  # fmt: skip
            keys.append(key)
            tags.append({"seq_len": len(ids), "prompt_len": len(prompt), "response_len": len(response)})
    batch = trainer_base.KVBatchMeta(keys=keys, tags=tags, partition_id="train", extra_info={})
    metrics: dict[str, Any] = {}
    batch = gad._compute_values(batch, metrics)

    # Literally: the value at the last token of prompt and response, the end marker behind the teacher's.
    def score(ids: list[int]) -> Tensor:
        return critic.embedding(torch.tensor(ids))[:, 0].sum()

    samples = [score(prompt + response) for uid, (_, prompt) in prompts.items() for response in responses[uid]]
    teachers = [score([*prompt, *texts[teacher], 2]) for teacher, prompt in prompts.values()]
    loss = torch.stack([softplus(-(teachers[i // 2] - s)) for i, s in enumerate(samples)]).mean()
    for key, value in zip(keys, samples, strict=True):
        rewards = queue.rows[key]["rm_scores"]
        assert rewards[-1].item() == pytest.approx(value.item(), rel=1e-5) and (rewards[:-1] == 0).all()
    assert metrics["discriminator/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["discriminator/teacher_score"] == pytest.approx(sum(t.item() for t in teachers) / 2, rel=1e-5)

    batch = gad._compute_advantage(batch, metrics)
    for first, second, a, b in ((keys[0], keys[1], *samples[:2]), (keys[2], keys[3], *samples[2:])):
        scores = torch.stack([a, b]).detach()
        expected = (scores - scores.mean()) / (scores.std() + 1e-6)
        for key, value in zip((first, second), expected, strict=True):
            assert queue.rows[key]["advantages"].tolist() == pytest.approx(
                [value.item()] * len(queue.rows[key]["responses"]), rel=1e-4
            )

    batch = trainer_base.KVBatchMeta(keys=keys, tags=tags, partition_id="train", extra_info={})
    gad._update_critic(batch, metrics)
    found = critic.embedding.weight.grad.clone()
    critic.zero_grad()
    loss.backward()
    torch.testing.assert_close(found, critic.embedding.weight.grad, rtol=1e-5, atol=1e-7)
    # What was made for the teacher is gone from the queue.
    assert sorted(queue.rows) == sorted(keys)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    with score_server() as (url, requests):
        monkeypatch.setenv("GADCORE_URL", url)
        text_rewards.service.cache_clear()
        yield requests
        text_rewards.service.cache_clear()


@pytest.mark.by_hand
@pytest.mark.skipif(not stacks.installed("verl"), reason="verl has an environment of its own")
def test_the_reward_manager_scores_whole_groups(asked: list[Any]) -> None:
    import numpy as np
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    from gadcore.integrations.verl.reward import GADRewardManager

    assert get_reward_manager_cls("gadcore") is GADRewardManager
    config = OmegaConf.create({"reward": {"num_workers": 1}, "actor_rollout_ref": {"rollout": {"n": 2}}})
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))

    def item(text: str, ended: bool, label: Any) -> DataProto:
        ids = torch.tensor([[*map(ord, text), *([0] if ended else []), 0, 0][: len(text) + 2]])
        seen = torch.ones(1, 3 + ids.shape[1], dtype=torch.int64)
        seen[0, 3 + len(text) + ended :] = 0
        talk = np.empty(1, dtype=object)
        talk[0] = [{"role": "user", "content": "Where?"}]
        extra = {"reward_model": np.array([{"ground_truth": label}], dtype=object), "raw_prompt": talk}
        extra["uid"] = np.array(["u"], dtype=object)
        tensors = TensorDict({"responses": ids, "attention_mask": seen}, batch_size=1)
        return DataProto(batch=tensors, non_tensor_batch=extra)

    async def everything() -> list[Any]:
        manager = GADRewardManager(config, tokenizer, None)
        return await asyncio.gather(
            manager.run_single(item("Paris", True, "In Paris.")), manager.run_single(item("ab", False, "In Paris."))
        )

    assert [found["reward_score"] for found in asyncio.run(everything())] == [5.0, 2.0]
    ((path, body),) = asked
    assert path == "/v1/score_and_update"
    assert body["groups"][0]["samples"] == ["Paris", "ab"] and body["groups"][0]["finished"] == [True, False]


def test_last_values() -> None:
    assert last_values(nested([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])).tolist() == [2.0, 3.0]
