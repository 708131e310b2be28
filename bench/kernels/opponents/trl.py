"""TRL's own GRPO path from hidden states on, driven through its own code.

GRPOTrainer patches its model with `add_fused_lm_head` and computes `_compute_loss`, which calls
`_get_per_token_logps_and_entropies`. Both methods run here unchanged, on a stand-in for the trainer that has the
settings they read, and with a model whose backbone hands out given hidden states. So the head, log-probabilities,
entropy (which TRL always computes in training), loss, its metrics and the backward pass are TRL's, tiles and all; what
comes before the head costs nothing. loss_type "dapo", TRL's default, is the mean over all tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.kernels.opponents.problem import HeadProblem
from bench.runner import Side


class _GivenHidden(torch.nn.Module):
    """A causal language model whose backbone returns what it was given."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.hidden, self.head = hidden, SimpleNamespace(weight=weight, bias=None)
        self.config = SimpleNamespace()
        self.config.get_text_config = lambda: self.config

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head

    def forward(self) -> None:
        """Replaced by add_fused_lm_head."""
        raise NotImplementedError


def trl_grpo(problem: HeadProblem) -> Side:
    """Loss and gradients by GRPOTrainer._compute_loss."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    rows, width = problem.groups.sequences, problem.hidden.shape[1]
    length = problem.tokens // rows
    # One prompt token in front: TRL drops the last position and scores every other one, here T of them.
    hidden = problem.hidden.detach().view(rows, length, width)
    hidden = torch.cat([hidden, hidden[:, -1:]], 1).requires_grad_()
    model: Any = _GivenHidden(hidden, problem.weight)
    add_fused_lm_head(model, temperature=problem.temperature, outputs=("log_probs", "entropy"))
    ones = torch.ones(rows, length + 1, dtype=torch.int64, device=hidden.device)
    inputs = {
        "prompt_ids": ones[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": problem.targets.view(rows, length),
        "completion_mask": ones[:, 1:],
        "advantages": problem.advantages,
        "ref_per_token_logps": problem.ref_logprob.view(rows, length),
        "num_items_in_batch": torch.tensor(problem.tokens, device=hidden.device),
    }
    trainer = _trainer(GRPOTrainer, model, problem)

    def call() -> dict[str, Tensor]:
        loss = GRPOTrainer._compute_loss(trainer, model, inputs)
        loss.backward()
        assert hidden.grad is not None and problem.weight.grad is not None
        d_hidden = hidden.grad[:, :-1].reshape(problem.hidden.shape)
        return {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": problem.weight.grad}

    def clear() -> None:
        problem.clear()
        hidden.grad = None

    return Side("TRL", call, clear)


def _trainer(trainer_class: Any, model: torch.nn.Module, problem: HeadProblem) -> Any:
    """What the two methods read of a GRPOTrainer with the defaults of GRPOConfig, but for beta and temperature."""
    accelerator = SimpleNamespace(
        autocast=nullcontext,
        num_processes=1,
        is_main_process=True,
        sync_gradients=True,
        reduce=lambda tensor, reduction: tensor,
        gather=lambda tensor: tensor,
    )
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1, report_to=[])
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        args=arguments,
        state=SimpleNamespace(global_step=0),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=problem.kl_coef,
        epsilon_low=problem.clip,
        epsilon_high=problem.clip,
        loss_type="dapo",
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    trainer._get_per_token_logps_and_entropies = MethodType(trainer_class._get_per_token_logps_and_entropies, trainer)
    return trainer


def trl_logprob(problem: HeadProblem) -> Callable[[], Tensor]:
    """Log-probabilities alone, as TRL's reference model computes them (no entropy)."""
    from trl.trainer.utils import add_fused_lm_head

    model: Any = _GivenHidden(problem.hidden[None], problem.weight)
    add_fused_lm_head(model, temperature=problem.temperature)

    def call() -> Tensor:
        # Not kept from the last call: its graph is gone after one backward pass.
        model.hidden = problem.hidden[None]
        return model(shift_labels=problem.targets[None], fused_lm_head=True).log_probs[0]

    return call
