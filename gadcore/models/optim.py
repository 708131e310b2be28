"""AdamW with clipping, as both models use it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.distributed.fsdp import is_sharded, local
from gadcore.distributed.gradients import add_up
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.models.readout import Readout, read


class Optimizer:
    """Fused AdamW over all parameters of a model, with the gradient clipped by its global norm.

    owner: what the model is called in errors. Over several processes each updates its shards; a model that all of them
    have whole each updates by the sum of their gradients, to the same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StudentSettings | DiscriminatorSettings,
        *,
        lr: float,
        owner: str,
        updated: Sequence[torch.Tensor] | None = None,
        own: torch.optim.Optimizer | None = None,
        world: World = ALONE,
    ) -> None:
        """updated: what AdamW updates in place of the parameters, in their order. own: an optimizer over the model's
        parameters to use in AdamW's place; ValueError where it has others. world: that trains the model."""
        self.adamw: torch.optim.Optimizer
        self.owner, self.world = owner, world
        self._sharded = is_sharded(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.grad_clip = settings.grad_clip
        if own is not None:
            given = {id(p) for group in own.param_groups for p in group["params"]}
            if given != {id(p) for p in self.parameters}:
                raise ValueError(f"the optimizer must have those parameters of the {owner} that take a gradient")
            self.adamw = own
            return
        self.adamw = torch.optim.AdamW(
            self.parameters if updated is None else updated,
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def allocate(self) -> None:
        """Makes the moments of all parameters that have none yet: zero, as the first step would."""
        for p in self.parameters:
            if not self.adamw.state[p]:
                self.adamw.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    def moments(self) -> list[torch.Tensor]:
        """The moments that are there, on the parameters' device; of shards, what this process has of them."""
        return [local(state[key]) for state in self.adamw.state.values() for key in ("exp_avg", "exp_avg_sq")]

    def weights(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """What is updated, and what a run has to keep of its weights, by the names of the parameters."""
        return dict(parameters)

    def weights_changed(self) -> None:
        """Says that somebody has written to what weights() gave: the parameters follow."""

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr

    def step(self, readouts: Sequence[Readout] = ()) -> float:
        """Clips, steps, clears; returns the gradient norm before clipping. UserError where it is not finite.

        readouts: read by the host together with the norm.
        """
        if not self._sharded:
            # Else the backward pass has done so.
            add_up([p.grad for p in self.parameters if p.grad is not None], self.world)
        norm_there = self._clip()
        (norm,) = read(readouts, norm_there)
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient of the {self.owner} is not finite, its weights are as they were before this step: "
                "lower its learning rate, or go on from the last checkpoint with other settings"
            )
        self._update()
        return norm

    def _clip(self) -> torch.Tensor:
        """Clips the gradient by its norm over all processes, which it returns: on all of them the same bits."""
        if not self._sharded:
            return nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        here = [gradient for gradient in gradients if gradient.numel()]
        norms = torch.stack(torch._foreach_norm(here)).double()
        # Of several copies of the shards one counts.
        squared = norms.square().sum() * (self.world.replica == 0)
        norm = self.world.sum_(squared).sqrt().to(here[0].dtype)
        # As in clip_grad_norm_().
        torch._foreach_mul_(here, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _update(self) -> None:
        """Updates by the gradient that is there, and clears it."""
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
