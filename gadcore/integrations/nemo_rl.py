"""GAD in NeMo-RL (0.6): an environment of one turn, scored by the discriminator service.

    from gadcore.integrations import nemo_rl
    nemo_rl.register()  # before create_env("gadcore", {..}), in the program that starts the training

The metadata of a row (extra_env_info) has "label": see gadcore.integrations.text_rewards. The environment for
validation gets {"held_out": true} in its settings. NeMo-RL hands over all samples of a batch at once where generation
is synchronous (policy.generation.vllm_cfg.async_engine: false), which whole groups need. Its environments are not told
whether a response was cut: all count as ended by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.text_rewards import Sample, by_prompt, held_out, scores

try:
    import ray
    import torch
    from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
except ImportError as error:
    raise UserError(f"gadcore.integrations.nemo_rl needs NeMo-RL with ray and torch: {error}") from error


class GADSteps(EnvironmentInterface):  # type: ignore[misc]
    """The environment as a plain class. settings: {"held_out": bool}; scores alone where it is true."""

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.held_out = bool((settings or {}).get("held_out", False))

    def step(self, message_log_batch: Sequence[Any], metadata: Sequence[Any]) -> Any:
        """D(x, y) of the last message of every conversation, which ends there."""
        prompts = [
            [{"role": m["role"], "content": m["content"]} for m in log[:-1] if m["role"] != "environment"]
            for log in message_log_batch
        ]
        labels = [self._label(known) for known in metadata]
        places = by_prompt([repr((prompt, label)) for prompt, label in zip(prompts, labels, strict=True)])
        if not self.held_out and any(len(own) == 1 for own in places):
            raise UserError(
                "NeMo-RL brings a prompt with a single sample: generate synchronously "
                "(policy.generation.vllm_cfg.async_engine=false) with num_generations_per_prompt of 2 or more"
            )
        answers = [log[-1]["content"] for log in message_log_batch]
        found = scores([(labels[own[0]], prompts[own[0]], [Sample(answers[i]) for i in own]) for own in places])
        rewards = torch.zeros(len(answers))
        for own, row in zip(places, found, strict=True):
            rewards[own] = torch.tensor(row, dtype=torch.float32)
        nothing = [None] * len(answers)
        observed = [{"role": "environment", "content": ""} for _ in answers]
        ended = torch.ones(len(answers), dtype=torch.bool)
        return EnvironmentReturn(observed, list(metadata), nothing, rewards, ended, answers)

    def _label(self, known: Any) -> Any:
        if not isinstance(known, Mapping) or "label" not in known:
            raise UserError(f'the metadata of a row must have "label", is {known!r:.200}')
        return held_out(known["label"]) if self.held_out else known["label"]

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        rewards = batch["rewards"] if "rewards" in batch else batch.get("total_reward")
        return batch, {} if rewards is None else {"discriminator/sample_score": float(rewards.float().mean())}


GADEnvironment = ray.remote(GADSteps)


def register(name: str = "gadcore") -> None:
    """Makes the environment known to NeMo-RL by a name, run by the Python that its own environments are run by."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    where = f"{__name__}.GADEnvironment"
    # create_env() refuses a class of which this table says nothing.
    ACTOR_ENVIRONMENT_REGISTRY[where] = PY_EXECUTABLES.SYSTEM
    register_env(name, where)
