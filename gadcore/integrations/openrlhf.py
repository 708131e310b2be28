"""GAD in OpenRLHF (0.11): an agent that draws one response and is scored by the discriminator service.

    python -m openrlhf.cli.train_ppo_ray .. --data.label_key label \\
        --train.agent_func_path "$(python -c 'import gadcore.integrations.openrlhf as m; print(m.__file__)')"

Not --reward.remote_url: what stands there is asked for one sample at a time, from a pool of threads that groups which
wait for their samples would fill. An agent is asked in the same event loop as its siblings. Labels: see
gadcore.integrations.text_rewards; with --data.apply_chat_template the prompt is rendered, and the label must bring its
own prompt or a row. Rows of an evaluation need "held_out": true in theirs, since the agent is not told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.text_rewards import Collector, Sample, scores, without_end

try:
    from openrlhf.utils.agent import SingleTurnAgentExecutor
except ImportError as error:
    raise UserError(f"gadcore.integrations.openrlhf needs openrlhf 0.11, which does not load: {error}") from error


class AgentExecutor(SingleTurnAgentExecutor):  # type: ignore[misc]
    """One response a prompt; its reward is D(x, y)."""

    def __init__(self) -> None:
        super().__init__(remote_rm_url=None)
        self._collector = Collector(_send)
        self._members: dict[int, int] = {}

    async def execute(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        # The engine makes one object of these for all samples of a prompt, and starts them before any of them is done.
        group = id(sampling_params)
        self._members[group] = self._members.get(group, 0) + 1
        drawn: dict[str, Any] = await super().execute(
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images
        )
        ((begin, end),) = drawn["action_ranges"]
        text = hf_tokenizer.decode(drawn["observation_tokens"][begin:end], skip_special_tokens=False)
        finished = not drawn["truncated"]
        sample = Sample(without_end(text, hf_tokenizer.all_special_tokens) if finished else text, finished)
        score = await self._collector.add(group, self._members[group], (label, prompt), sample)
        self._members.pop(group, None)
        return drawn | {"reward": score, "scores": score}


async def _send(given: tuple[Any, str], samples: Sequence[Sample]) -> list[float]:
    return (await asyncio.to_thread(scores, [(*given, samples)]))[0]
