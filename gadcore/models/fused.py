"""A faster backbone with the same mathematics: by Liger-Kernel on CUDA, by gadcore.cpu on a CPU."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from gadcore import cpu
from gadcore.errors import UserError


def fuse_backbone(model: PreTrainedModel) -> int:
    """Replaces forward passes of the backbone's modules by faster ones; returns how many.

    Parameters stay where they are. UserError where the package that CUDA needs is missing.
    """
    return _liger(model) if model.device.type == "cuda" else cpu.fuse(model)


def _liger(model: PreTrainedModel) -> int:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError(f"the fused backbone on CUDA needs liger-kernel: pip install liger-kernel ({error})") from error
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return 0
    # The head is gadcore's own: no [tokens, vocabulary] logits are ever made.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return len(list(model.modules()))


def embed_in_place(model: PreTrainedModel) -> bool:
    """Lets the gradient of the token embedding be added to what is there already, where gadcore.cpu can."""
    return model.device.type == "cpu" and cpu.embed_in_place(model)


def gradient_in_place(weight: Tensor, autocast: str) -> Tensor | None:
    """The gradient that an earlier pass has left of an output head, where the next one can be added to it."""
    return cpu.gradient_in_place(weight, autocast) if weight.device.type == "cpu" else None


# What the backward pass makes again for next to nothing; nothing on CUDA, where Liger's functions do so themselves.
Recomputables, recomputing = cpu.Recomputables, cpu.recomputing
