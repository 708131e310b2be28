"""GAD in verifiers (0.4) and so in prime-rl: an environment whose attempts are scored as one group.

    uv run eval .. --env.id gadcore.integrations.verifiers --env.n 8

verifiers has no rubrics any more; what compares attempts is an environment's finalize(). One agent attempts the task n
times, and the discriminator service scores the attempts together: the reward "discriminator" of every trace. With
prime-rl one episode is the group (group_size = 1), over which its grpo takes advantages. The task's data has a field
teacher_response, or label: see gadcore.integrations.text_rewards.
"""

from __future__ import annotations

import asyncio
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.text_rewards import Sample, held_out, scores

try:
    import verifiers.v1 as vf
    from verifiers.v1.envs.best_of_n import BestOfNEnv, BestOfNEnvConfig
except ImportError as error:
    raise UserError(f"gadcore.integrations.verifiers needs verifiers 0.4, which does not load: {error}") from error

__all__ = ["GADEnv", "GADEnvConfig"]


class GADEnvConfig(BestOfNEnvConfig):  # type: ignore[misc]
    held_out: bool = False
    """Scores without training the discriminator, for an evaluation."""


class GADEnv(BestOfNEnv, vf.Env[GADEnvConfig]):  # type: ignore[misc]
    async def finalize(self, task: Any, episode: Any) -> None:
        """Records D(x, y) on every attempt that was completed."""
        traces = [trace for trace in episode.traces if not trace.has_error]
        if not traces:
            return
        samples = [Sample(trace.last_reply, not trace.is_truncated) for trace in traces]
        label = self._label(task.data)
        (found,) = await asyncio.to_thread(scores, [(label, _messages(task.data), samples)])
        for trace, score in zip(traces, found, strict=True):
            trace.record_reward("discriminator", score)

    def _label(self, data: Any) -> Any:
        label = getattr(data, "label", None)
        teacher = getattr(data, "teacher_response", None)
        if label is None and teacher is None:
            raise UserError("the task's data must have teacher_response, the teacher's text, or label")
        known = label if label is not None else {"teacher_response": teacher}
        return held_out(known) if self.config.held_out else known


def _messages(data: Any) -> list[dict[str, str]]:
    """The conversation that an attempt answers."""
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return [*system, *({"role": m.role, "content": vf.content_text(m.content)} for m in data.prompt or [])]
