"""Liger-Kernel's fused linear GRPO loss, the best known alternative on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.kernels.opponents.problem import HeadProblem
from bench.runner import Side


def liger_grpo(problem: HeadProblem, *, compiled: bool = True) -> Side:
    """LigerFusedLinearGRPOLoss with its defaults: a chunk is one response, the loss a mean over all tokens ("dapo")."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows, width = problem.groups.sequences, problem.hidden.shape[1]
    length = problem.tokens // rows
    loss_of = LigerFusedLinearGRPOLoss(
        beta=problem.kl_coef,
        compiled=compiled,
        use_ref_model=True,
        epsilon_low=problem.clip,
        epsilon_high=problem.clip,
        loss_type="dapo",
        temperature=problem.temperature,
    )
    mask = torch.ones(rows, length, dtype=torch.int64, device=problem.hidden.device)

    def call() -> dict[str, Tensor]:
        loss, _ = loss_of(
            problem.hidden.view(rows, length, width),
            problem.weight,
            problem.targets.view(rows, length),
            mask,
            problem.advantages,
            ref_per_token_logps=problem.ref_logprob.view(rows, length),
        )
        loss.backward()
        assert problem.hidden.grad is not None and problem.weight.grad is not None
        return {"loss": loss.detach(), "d_hidden": problem.hidden.grad, "d_weight": problem.weight.grad}

    return Side("Liger", call, problem.clear, compiled=compiled)
