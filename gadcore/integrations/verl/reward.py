"""A reward manager for the discriminator service, for verl's other trainers and for a discriminator of its own process.

    reward.reward_manager.source=importlib reward.reward_manager.module.path=pkg://gadcore.integrations.verl.reward \\
    reward.reward_manager.name=GADRewardManager reward.num_workers=1

The label (gadcore.integrations.text_rewards) is the row's reward_model.ground_truth, the prompt its raw_prompt. verl
scores one sample at a time, by whichever worker: a group comes together in one worker alone. Rows of a validation need
"held_out": true in their label, since a reward manager is not told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.text_rewards import Collector, Sample, is_held_out, scores

try:
    from verl.experimental.reward_loop.reward_manager import register
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
except ImportError as error:
    raise UserError(f"gadcore.integrations.verl.reward needs verl 0.9 with its extra verl-core: {error}") from error


@register("gadcore")
class GADRewardManager(RewardManagerBase):  # type: ignore[misc]
    """D(x, y) of a sample, once the samples of its prompt are there."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        if config.reward.num_workers != 1:
            raise UserError(
                f"reward.num_workers is {config.reward.num_workers}, and the samples of a prompt would meet in none of "
                "them: set it to 1"
            )
        self._samples = int(config.actor_rollout_ref.rollout.n)
        self._collector = Collector(_send)

    async def run_single(self, data: Any) -> dict[str, Any]:
        item = data[-1]
        ids = item.batch["responses"]
        ids = ids[: int(item.batch["attention_mask"][-len(ids) :].sum())].tolist()
        label = item.non_tensor_batch["reward_model"]["ground_truth"]
        prompt = [{"role": m["role"], "content": m["content"]} for m in item.non_tensor_batch["raw_prompt"]]
        finished = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        text = self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
        sample = Sample(text, finished)
        if is_held_out(label):
            (score,) = await _send((label, prompt), [sample])
        else:
            uid = item.non_tensor_batch["uid"]
            score = await self._collector.add(uid, self._samples, (label, prompt), sample)
        return {"reward_score": score, "reward_extra_info": {"discriminator": score}}


async def _send(given: tuple[Any, Any], samples: Sequence[Sample]) -> list[float]:
    return (await asyncio.to_thread(scores, [(*given, samples)]))[0]


def no_reward(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
    """A reward function for GADTrainer, which puts the discriminator's scores in its place."""
    return 0.0
