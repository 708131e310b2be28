"""GADTrainer: verl's synchronous trainer with the critic as the discriminator.

    VERL_USE_EXTERNAL_MODULES=gadcore.integrations.verl.trainer python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=gad algorithm.adv_estimator=grpo critic.enable=true critic.ppo_epochs=1 \\
        reward.custom_reward_function.path=pkg://gadcore.integrations.verl.reward \\
        reward.custom_reward_function.name=no_reward ..

The teacher's text is the row's reward_model.ground_truth. The value model scores samples and teacher's responses at
their last token, in the pass that verl makes for values anyway; a sample's score is its reward, and what the BT loss of
all pairs says of each score is the coefficient of that row in the critic's loss. So no two rows of a pair have to meet
in a micro-batch or on a rank. trainer.critic_warmup is GAD's warmup of the discriminator; verl's checkpoints hold it.
"""

from __future__ import annotations

from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.verl.loss import WEIGHT, bt_loss, last_values, pairs_of

try:
    import ray
    import torch
    import transfer_queue as tq
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.padding_utils import (
        build_padding_position_ids,
        construct_minimal_padding_template,
        upsample_batch_to_divisible_size,
    )
    from verl.trainer.ppo.v1 import register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils.metric import reduce_metrics
    from verl.utils.tensordict_utils import get_tensordict, list_of_dict_to_tensordict
    from verl.workers.utils.padding import response_from_nested
except ImportError as error:
    raise UserError(f"gadcore.integrations.verl.trainer needs verl 0.9 with its extra verl-core: {error}") from error


@register_trainer("gad")
class GADTrainer(PPOTrainerSync):  # type: ignore[misc]
    """Raises UserError for settings under which the critic cannot be the discriminator."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not self.use_critic:
            raise UserError("the discriminator is verl's critic: set critic.enable=true")
        estimator = config.algorithm.adv_estimator
        if estimator != "grpo":
            raise UserError(f"GAD's advantages are over groups: set algorithm.adv_estimator=grpo, not {estimator}")
        if config.critic.ppo_epochs != 1:
            raise UserError(
                f"the discriminator takes one step a batch: set critic.ppo_epochs=1, not {config.critic.ppo_epochs}"
            )
        self._scored: Any = None

    def _setup(self) -> None:
        super()._setup()
        self.critic_wg.set_loss_fn(bt_loss)

    def _compute_values(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Scores of samples and teacher's responses, under the weights from before the step; rewards of the samples."""
        groups = self._groups(batch)
        whole = self._with_teachers(batch, groups)
        whole.extra_info.update(
            {"compute_loss": False, "temperature": self.config.actor_rollout_ref.rollout.temperature}
        )
        ray.get(self.critic_wg.infer_batch(whole).futures)
        data = tq.kv_batch_get(
            keys=whole.keys, partition_id=whole.partition_id, select_fields=["values", "response_mask"]
        )
        scores = last_values(data["values"])
        found = pairs_of(scores, [(len(batch) + g, rows) for g, rows in enumerate(groups)])
        metrics.update(
            {
                "discriminator/loss": found.loss,
                "discriminator/accuracy": found.accuracy,
                "discriminator/margin": found.margin,
                "discriminator/teacher_score": float(scores[len(batch) : len(batch) + len(groups)].mean()),
                "discriminator/sample_score": float(scores[[row for rows in groups for row in rows]].mean()),
            }
        )
        lengths = data["response_mask"].offsets().diff().tolist()
        self._put(whole, {WEIGHT: _at_the_end(found.coefficients, lengths)})
        values = response_from_nested(data["values"], data["response_mask"])
        own = lengths[: len(batch)]
        rewards = torch.zeros(len(batch))
        for rows in groups:
            rewards[rows] = scores[rows]
        self._put(
            batch, {"values": _nested(list(values.unbind())[: len(batch)]), "rm_scores": _at_the_end(rewards, own)}
        )
        self._scored = whole
        return batch

    def _update_critic(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """One step of the discriminator on the scores of _compute_values()."""
        whole, self._scored = self._scored, None
        whole.extra_info.update(
            {
                "global_batch_size": len(whole),
                "mini_batch_size": len(whole),
                "epochs": 1,
                "seed": self.config.critic.data_loader_seed,
                "dataloader_kwargs": {"shuffle": False},
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
        )
        output = self.critic_wg.train_mini_batch(whole).get()
        found = reduce_metrics({f"discriminator/{name}": value for name, value in output["metrics"].items()})
        # The sum of scores times coefficients: its gradient is the loss's, its value is not.
        metrics.update({name: value for name, value in found.items() if name != "discriminator/loss"})
        tq.kv_clear(keys=whole.keys[len(batch) :], partition_id=whole.partition_id)
        return batch

    def _groups(self, batch: Any) -> list[list[int]]:
        """Rows of every prompt, without those that only fill the batch."""
        uids = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid"])["uid"]
        places: dict[str, list[int]] = {}
        for row, (uid, tag) in enumerate(zip(uids, batch.tags, strict=True)):
            if not tag.get("is_padding", False):
                places.setdefault(uid, []).append(row)
        return list(places.values())

    def _with_teachers(self, batch: Any, groups: list[list[int]]) -> Any:
        """The batch with a row for the teacher's response of every group behind it, filled up for all ranks."""
        rows, tags = zip(*(self._teacher(batch, own[0]) for own in groups), strict=True)
        keys = [f"{row['uid']}_0_0" for row in rows]
        tq.kv_batch_put(
            keys=keys, partition_id=batch.partition_id, fields=list_of_dict_to_tensordict(list(rows)), tags=list(tags)
        )
        whole = KVBatchMeta(
            keys=[*batch.keys, *keys],
            tags=[*batch.tags, *tags],
            partition_id=batch.partition_id,
            fields=batch.fields,
            extra_info=dict(batch.extra_info),
        )
        return upsample_batch_to_divisible_size(whole, self._critic_ranks(), self.tokenizer.eos_token_id)

    def _critic_ranks(self) -> int:
        known = self.critic_wg._dispatch_info
        if "train" not in known:
            known["train"] = self.critic_wg._query_dispatch_info("train")
        return int(max(known["train"])) + 1

    def _teacher(self, batch: Any, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(fields, tag) of the teacher's response to the prompt of a row, with the end marker of a finished sample."""
        sample = tq.kv_batch_get(keys=[batch.keys[row]], partition_id=batch.partition_id)[0]
        text = sample["reward_model"]["ground_truth"]
        if not isinstance(text, str) or not text:
            raise UserError(f"reward_model.ground_truth must be the teacher's text, is {text!r:.80}")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt, response = sample["prompts"], torch.tensor([*ids, self.tokenizer.eos_token_id])
        before, mask = len(sample["responses"]), torch.ones(len(response), dtype=torch.int64)
        fields, tag = construct_minimal_padding_template(sample, batch.tags[row], self.tokenizer.eos_token_id)
        # What verl has written of the sample so far, by response token.
        for name, value in fields.items():
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == before:
                fields[name] = value.new_zeros((len(response), *value.shape[1:]))
        whole = torch.cat([prompt, response])
        seen = torch.ones_like(whole)
        fields.update(
            prompts=prompt,
            responses=response,
            input_ids=whole,
            attention_mask=seen,
            position_ids=build_padding_position_ids(sample.get("position_ids"), seen),
            response_mask=mask,
            loss_mask=mask,
            rm_scores=torch.zeros(len(response)),
            rollout_log_probs=torch.zeros(len(response)),
            uid=f"teacher{sample['uid']}",
        )
        tag.update(prompt_len=len(prompt), response_len=len(response), seq_len=len(whole))
        return fields, tag

    @staticmethod
    def _put(batch: Any, fields: dict[str, Any]) -> None:
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=get_tensordict(fields))


def _at_the_end(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Nested [rows, lengths], 0 but at the last place of every row."""
    rows = [torch.zeros(length) for length in lengths]
    for row, value in zip(rows, values, strict=True):
        row[-1] = value
    return _nested(rows)


def _nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
