"""What only makes a CPU faster, behind doors: without it everything computes the same, slower.

    install(), release()         the pool of CPU tensors
    parts()                      a trainer's backbone; embed_in_place(), gradient_in_place(), recomputing() beside
    adapt_vllm(llm)              vLLM in this process; decoding_linear() before its model is loaded

GADCORE_NO_NATIVE=1 closes all of them, and the native ops of kernels/cpu with them.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.cpu.recompute import Recomputables, recomputing

__all__ = [
    "Recomputables", "adapt_vllm", "decoding_linear", "embed_in_place", "enabled", "gradient_in_place", "install",
    "parts", "recomputing", "release",
]  # fmt: skip


def enabled() -> bool:
    """Whether the doors are open in this process."""
    return os.environ.get("GADCORE_NO_NATIVE") != "1"


def install() -> bool:
    """Lets CPU tensors that are made from now on lie in a pool (pool.py); False where there is none."""
    from gadcore.cpu import pool

    return enabled() and pool.install()


def release() -> None:
    """Returns the pool's memory that no tensor uses to the system."""
    from gadcore.cpu import pool

    pool.release()


def parts() -> ModuleType | None:
    """Faster forward passes of a backbone's modules (backbone.py), None where the doors are closed."""
    from gadcore.cpu import backbone

    return backbone if enabled() else None


def embed_in_place(model: PreTrainedModel) -> bool:
    """Lets the gradient of the token embedding be added to what is there already; see backbone.embed_in_place()."""
    from gadcore.cpu import backbone

    return enabled() and backbone.embed_in_place(model)


def gradient_in_place(weight: Tensor, autocast: str) -> Tensor | None:
    """An output head's gradient that the next one can be added to; see backbone.gradient_in_place()."""
    from gadcore.cpu import backbone

    return backbone.gradient_in_place(weight, autocast) if enabled() else None


def decoding_linear() -> Any:
    """(x, weight, bias) -> the product, as vLLM's layers call it on a CPU."""
    if not enabled():
        return F.linear
    from gadcore.kernels.cpu.linear_few_rows import decoding_linear as fastest

    return fastest()


def adapt_vllm(llm: Any) -> None:
    """Gives the layers and the sampler of a vLLM that runs in this process less work (vllm.py)."""
    if enabled():
        from gadcore.cpu import vllm

        vllm.adapt(llm)
