"""Which ops there are, and which implementations each has: what chooses one, tests it and lists it reads this table.

The op `x` is the function `x` of kernels/x.py, which states the mathematics and holds the PyTorch reference; of
kernels/cpu/x.py where nothing but a CPU gains from it. Its implementations have its name:

    triton    kernels/triton/x.py, a function for each pass
    flash     kernels/flash/x.py, the same by the package flash-attn-4
    cpu       torch.ops.gadcore.cpu_x for the pass "forward" and cpu_x_backward for "backward", from csrc/cpu
    cuda      kernels/cuda/x.py, the binding of csrc/cuda/x.cu
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SINGLE = (torch.float32,)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = ("forward", "backward")


class Op(NamedTuple):
    """computes: what, in a few words. triton, cpu, flash: the dtypes that each implementation takes, none where there
    is none; the reference takes all. passes: of triton and cpu, none where the op is made of others'. cuda: whether
    there is CUDA C++. grid: whether tests/support/grid_checks.py holds every implementation against float64."""

    computes: str
    passes: tuple[str, ...] = ()
    triton: tuple[torch.dtype, ...] = ()
    cpu: tuple[torch.dtype, ...] = ()
    flash: tuple[torch.dtype, ...] = ()
    cuda: bool = False
    grid: bool = False


OPS = {
    "linear_logprob": Op(
        "log-probability (and entropy) of given tokens from hidden states, without [T, V] but for a budget",
        passes=BOTH,
        triton=KERNEL_DTYPES,
        cpu=KERNEL_DTYPES,
        grid=True,
    ),
    "linear_grpo_loss": Op(
        "the GRPO loss from hidden states with all gradients, in three matrix products",
        passes=("forward",),
        triton=KERNEL_DTYPES,
        cpu=KERNEL_DTYPES,
        grid=True,
    ),
    "grpo_ratio_loss": Op(
        "the GRPO loss of log-probabilities that are there already",
        passes=("forward",),
        triton=SINGLE,
        cpu=SINGLE,
        grid=True,
    ),
    "bt_score": Op(
        "scores at last tokens, and the Bradley-Terry loss over the pairs of every group",
        passes=BOTH,
        triton=KERNEL_DTYPES,
        cpu=KERNEL_DTYPES,
        grid=True,
    ),
    "prefix_attention": Op(
        "attention of packed groups: responses see their shared prompt and themselves",
        passes=BOTH,
        triton=KERNEL_DTYPES,
        cpu=SINGLE,
        flash=(torch.bfloat16, torch.float16),
    ),
    "last_token_attention": Op("the same for the last token of every response alone"),
    "rotary": Op(
        "rotary position embedding of queries or keys",
        passes=("forward",),
        triton=KERNEL_DTYPES,
        cpu=SINGLE,
        grid=True,
    ),
    "rms_norm": Op("RMS norm over the last dimension", passes=BOTH, triton=KERNEL_DTYPES, cpu=SINGLE, grid=True),
    "take_rows": Op(
        "rows by index, with gradients of repeated ones added up in a fixed order",
        passes=("backward",),
        triton=KERNEL_DTYPES,
        grid=True,
    ),
    "cast_copy": Op("many copies with casts between floating dtypes, in one launch", cuda=True),
    "linear": Op("a linear layer of many rows with its gradients, as in training", cpu=SINGLE),
    "linear_few_rows": Op("a linear layer of at most 64 rows, as in decoding", passes=("forward",), cpu=SINGLE),
    "gated_mlp": Op("a gated MLP with its three products and their gradients", cpu=SINGLE),
    "swiglu": Op("the gated activation of an MLP", passes=BOTH, cpu=SINGLE),
    "lora_linear": Op("a linear layer of a frozen weight with a low-rank adapter"),
    "lora_gated_mlp": Op("a gated MLP of frozen weights with three such adapters, on a CPU"),
}


def module_of(op: str) -> str:
    """The module whose function `op` is the op."""
    only_cpu = OPS[op].cpu and not (OPS[op].triton or OPS[op].cuda)
    return f"gadcore.kernels.{'cpu.' if only_cpu else ''}{op}"


def native_op(op: str, which: str = "forward") -> str:
    """The name in torch.ops.gadcore of the C++ for a pass of `op`."""
    return f"cpu_{op}" if which == "forward" else f"cpu_{op}_{which}"
