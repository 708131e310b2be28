"""What the Triton kernels share: device facts, autotuning, operands, products with fp32 accumulation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

P = ParamSpec("P")
R = TypeVar("R")

INTERPRETED = triton.knobs.runtime.interpret
IGNORED = tl.constexpr(-100)
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))

# Figures of an H100, for tensors that lie on no GPU (the interpreter, meta tensors).
DEFAULT_SMS, DEFAULT_L2_BYTES = 132, 50 << 20
# Shared memory that one program may have, by compute capability; any other has the least.
SHARED_BYTES = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
LEAST_SHARED_BYTES = 101376
# A tile of this many fp32 accumulators takes half of an SM's registers with its epilogue; two such programs fit.
HALF_SM_TILE = 128 * 128


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function with the device of its first argument current: Triton launches there, wherever tensors lie."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return call


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; those of an H100 for any other."""
    return int(_properties(device.index or 0).multi_processor_count) if device.type == "cuda" else DEFAULT_SMS


def l2_bytes(device: torch.device) -> int:
    """Bytes of L2 of a CUDA device; those of an H100 for any other."""
    return int(_properties(device.index or 0).L2_cache_size) if device.type == "cuda" else DEFAULT_L2_BYTES


def capability() -> int:
    """Compute capability of the active target, as 80, 90, 100."""
    return int(triton.runtime.driver.active.get_current_target().arch)


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one program may have."""
    return SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)


# ---- tiles of logits -------------------------------------------------------------------------------------------


def _block_shapes(args: dict[str, Any]) -> None:
    for name, rows in (("hidden", "BT"), ("weight", "BV")):
        if isinstance(args[name], TensorDescriptor):
            args[name].block_shape = [args[rows], args["BK"]]


def tile_config(BT: int, BV: int, BK: int, num_warps: int, num_stages: int) -> triton.Config:
    """A tile of BT tokens by BV of the vocabulary, BK of H at a time."""
    blocks = {"BT": BT, "BV": BV, "BK": BK}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages, pre_hook=_block_shapes)


TILE_CONFIGS = [
    tile_config(128, 256, 64, 8, 4),
    tile_config(128, 128, 64, 8, 3),
    tile_config(64, 128, 64, 4, 4),
    tile_config(64, 64, 32, 4, 3),
]
DEPTH = 64  # every BK divides it
FEW_TOKENS = 64


def token_bucket(T: int) -> int:
    """What the autotuner sees of T: ragged batches must not tune anew at every step."""
    return FEW_TOKENS if T <= FEW_TOKENS else 1024 if T <= 1024 else 16384


def _usable(config: triton.Config, itemsize: int, descriptors: bool, tokens: int, arch: int) -> bool:
    BT, BV, BK = (config.kwargs[name] for name in ("BT", "BV", "BK"))
    if itemsize == 4:
        # Exact fp32 products run on the FMA units, with operands in registers: only a small tile does not spill.
        return BT * BV == 64 * 64
    if BT * BV == 64 * 64 or (BT == FEW_TOKENS) != (tokens == FEW_TOKENS):
        return False
    # Only sm_90 and sm_100 multiply out of shared memory; elsewhere operands take registers, as addresses do without
    # descriptors.
    accumulators = BT * BV // (32 * config.num_warps)
    if accumulators > (128 if arch // 10 in (9, 10) and descriptors else 64):
        return False
    return config.num_stages * (BT + BV) * BK * itemsize <= shared_limit(arch)


def prune_tiles(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """Those of `configs` that fit the target's shared memory and registers and the number of tokens."""
    args = {**args, **kwargs}
    hidden = args["hidden"]
    descriptors = isinstance(hidden, TensorDescriptor)
    itemsize = (hidden.base if descriptors else hidden).dtype.itemsize
    arch = capability()
    return [config for config in configs if _usable(config, itemsize, descriptors, args["TOKENS"], arch)]


def autotune_tiles(*, key: list[str]) -> Callable[[Any], Any]:
    """triton.autotune over TILE_CONFIGS. The interpreter, which cannot time anything, gets the first one alone."""
    configs = TILE_CONFIGS[:1] if INTERPRETED else TILE_CONFIGS
    return triton.autotune(configs=configs, key=key, prune_configs_by={"early_config_prune": prune_tiles})


@triton.jit
def place(T, tiles, group_tokens, BT: tl.constexpr):
    """This program's token block and its index along the vocabulary (`tiles` of those in all).

    Token blocks are taken in groups whose rows of `hidden` stay in L2; within a group those with the same share of
    the vocabulary run side by side, so that one read of it from memory serves all of them.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BT)
    group = group_tokens // BT
    first = pid // (group * tiles) * group
    size = tl.minimum(blocks - first, group)
    local = pid - first * tiles
    return first + local % size, local // size


def group_tokens(T: int, row_bytes: int, l2: int) -> int:
    """Tokens of a group of `place`, a multiple of 128: about as many as fill half of L2, all groups alike."""
    groups = triton.cdiv(T * row_bytes, max(l2 // 2, 128 * row_bytes))
    return triton.cdiv(triton.cdiv(T, groups), 128) * 128


@triton.jit
def logits_tile(
    hidden,
    weight,
    first_row,
    first_column,
    T,
    V,
    stride_hidden,
    stride_weight,
    H: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BT, BV] of hidden @ weight.T in fp32. Rows and columns past the end hold finite or copied values: mask them."""
    z = tl.zeros((BT, BV), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, H, BK):
            a = hidden.load([first_row, k])
            b = weight.load([first_column, k])
            z = tl.dot(a, b.T, z, input_precision="ieee")
    else:
        # Rows past the end read the last one once more, which costs less than a mask. 64 bits: rows * stride is large.
        rows = tl.minimum(first_row + tl.arange(0, BT), T - 1).to(tl.int64)
        columns = tl.minimum(first_column + tl.arange(0, BV), V - 1).to(tl.int64)
        a_ptrs = hidden + rows[:, None] * stride_hidden + tl.arange(0, BK)[None, :]
        b_ptrs = weight + columns[None, :] * stride_weight + tl.arange(0, BK)[:, None]
        for _ in range(0, H, BK):
            z = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), z, input_precision="ieee")
            a_ptrs += BK
            b_ptrs += BK
    return z


@triton.jit
def add_bias(z, bias, first_column, V, BV: tl.constexpr):
    """z + bias, and -inf in columns past the end."""
    columns = first_column + tl.arange(0, BV)
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < V, other=float("-inf")).to(tl.float32)[None, :]
    elif first_column + BV > V:
        z = tl.where(columns[None, :] < V, z, float("-inf"))
    return z


# ---- operands and products -------------------------------------------------------------------------------------


def has_descriptors(dtype: torch.dtype) -> bool:
    """Whether tiles of this dtype are read through tensor descriptors (TMA). fp32 waits for the FMA units anyway."""
    return dtype.itemsize == 2 and (INTERPRETED or capability() >= 90)


def aligned(x: Tensor) -> Tensor:
    """x [N, H] itself where its rows can be read 16 bytes at a time, else a copy with zeros up to a multiple of DEPTH.

    Descriptors fill up H themselves. Pointers need whole steps of DEPTH, and strides that Triton's specialisation on
    multiples of 16 sees through; read piecemeal, operands would spill.
    """
    rows, H = x.shape
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        if has_descriptors(x.dtype):
            if x.stride(0) >= H and x.stride(0) * x.element_size() % 16 == 0:
                return x
        elif x.stride(0) % 16 == 0 and H % DEPTH == 0:
            return x
    padded = x.new_zeros(rows, triton.cdiv(H, DEPTH) * DEPTH)
    padded[:, :H] = x
    return padded


def tile_bias(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """The bias [V] or None of a head, as `add_bias` wants it.

    Where V is no multiple of 16, columns past the end are masked one by one, which spills; loading a bias brings the
    mask along for nothing.
    """
    if bias is None:
        return weight.new_zeros(weight.shape[0]) if weight.shape[0] % 16 else None
    return bias.contiguous()


class Operands(NamedTuple):
    """What a kernel takes for `logits_tile`, by its names. hidden, weight: tensors or descriptors."""

    hidden: Any
    weight: Any
    stride_hidden: int
    stride_weight: int
    constants: dict[str, Any]


def operands(hidden: Tensor, weight: Tensor, T: int) -> Operands:
    """Of `aligned` tensors [T, H] and [V, H]."""
    strides = hidden.stride(0), weight.stride(0)
    descriptors = has_descriptors(hidden.dtype)
    a: Any = hidden
    b: Any = weight
    if descriptors:
        # The block shapes are the autotuner's: `_block_shapes` sets them.
        a, b = TensorDescriptor.from_tensor(hidden, [1, 8]), TensorDescriptor.from_tensor(weight, [1, 8])
    constants = {
        "H": triton.cdiv(hidden.shape[1], DEPTH) * DEPTH,
        "DESCRIPTORS": descriptors,
        "TOKENS": token_bucket(T),
    }
    return Operands(a, b, *strides, constants)


def contiguous(x: Tensor | None) -> Tensor | None:
    """The same where it is None or contiguous, else a contiguous copy."""
    return None if x is None else x.contiguous()


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
    """out = alpha a @ b, plus what is in `out` already where `add`; accumulates in fp32.

    out: [M, N], of the dtype of a and b or fp32, rows of any stride. On CUDA the product is cuBLAS's; with `out` in
    bf16 or fp16 it may add up parts of it in that type, unless
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction (or allow_fp16_..) is off.
    """
    if a.device.type == "cpu":
        product = (a.float() @ b.float()).mul_(alpha)
        out.copy_(out + product if add else product)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=int(add), out=out)
