"""Measures this machine: products, the packed layers, the head, memory, decoding, files. The figures are kept by
gadcore.plan.calibration.

Everything is timed on the sizes of a model's own layers, with random weights: no model is loaded. Where one thread
computes, the clock is CPU time, so that other programs on the machine do not count; else it is wall time.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.kernels.cpu.linear import linear
from gadcore.kernels.cpu.linear_few_rows import decoding_linear
from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.models.backbone import hidden_states, use_packed_attention
from gadcore.models.fused import fuse_backbone
from gadcore.plan.activations import with_layers
from gadcore.plan.dimensions import Dimensions
from gadcore.plan.machine import DECODE_ROWS

_HEAD_TOKENS = 512
# Weights that a decoding step reads must not stay in a cache.
_DECODE_BYTES = 300e6
_FILE_BYTES = 256 << 20
_COPY_BYTES = 256 << 20


def measure(d: Dimensions, config: PreTrainedConfig, log: Callable[[str], None]) -> dict[str, float]:
    """Figures by the names that gadcore.plan.machine gives them.

    log: gets a line about every part as it begins.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = _Clock(device)
    figures: dict[str, float] = {}
    log("products and layers")
    dtypes = ("float32", "bfloat16")
    for dtype in dtypes:
        figures[f"product_flops_{dtype}"] = _products(d, clock, getattr(torch, dtype))
    main = "bfloat16" if device.type == "cuda" else "float32"
    rate = figures[f"product_flops_{main}"]
    figures["product_share"] = 1.0
    figures["elementwise_share"] = _elementwise(d, config, clock, rate, getattr(torch, main))
    log("output head")
    figures["head_share"] = min(1.0, _head(d, clock, getattr(torch, main)) / rate)
    log("memory")
    figures["memory_bandwidth"], figures["memory_share"] = _copy(clock), 1.0
    log("decoding")
    figures |= _decode(d, clock, rate, getattr(torch, main))
    log("files")
    figures["file_write"], figures["file_read"] = _files()
    return figures


class _Clock:
    """Median seconds of a function on a device, after a call that is not timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        one_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self._now = time.process_time if one_thread else time.perf_counter

    def __call__(self, work: Callable[[], object], repeats: int = 5) -> float:
        work()
        seconds = []
        for _ in range(repeats):
            self._wait()
            begin = self._now()
            work()
            self._wait()
            seconds.append(self._now() - begin)
        return median(seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _matrices(d: Dimensions, count: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The fused matrices [out, in] of `count` layers."""
    shapes = [(d.query + 2 * d.key, d.hidden), (d.hidden, d.query), (2 * d.mlp, d.hidden), (d.hidden, d.mlp)]
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(count) for shape in shapes]


def _tokens(d: Dimensions, device: torch.device) -> int:
    if device.type == "cuda":
        return 4096
    return 512 if d.layer < 50e6 else 128


def _products(d: Dimensions, clock: _Clock, dtype: torch.dtype) -> float:
    tokens = _tokens(d, clock.device)
    if dtype == torch.bfloat16 and clock.device.type == "cpu":
        tokens //= 8  # Many times slower without matrix instructions.
    weights = _matrices(d, 2 if d.layer < 50e6 else 1, clock.device, dtype)
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=clock.device, dtype=dtype) for w in weights}
    with torch.no_grad():
        seconds = clock(lambda: [linear(inputs[w.shape[1]], w) for w in weights], repeats=3)
    return 2 * tokens * sum(w.numel() for w in weights) / seconds


def _elementwise(d: Dimensions, config: PreTrainedConfig, clock: _Clock, rate: float, dtype: torch.dtype) -> float:
    """Share of a layer's forward and backward pass that its products would not take at their own rate."""
    count = 2 if d.layer < 50e6 else 1
    small = with_layers(config, count, vocab_size=1024, pad_token_id=None)
    with clock.device:
        model = AutoModelForCausalLM.from_config(small, dtype=dtype).eval()
    use_packed_attention(model)
    fuse_backbone(model)
    length = 64
    groups = [
        GroupTokens(tuple(1 + i % 7 for i in range(length)), (tuple(1 + i % 5 for i in range(length)),))
        for _ in range(_tokens(d, clock.device) // (2 * length))
    ]
    batch = GroupedBatch.of(groups, last_tokens=True, device=clock.device)

    def step() -> None:
        hidden_states(model, batch).sum().backward()
        model.zero_grad()

    seconds = clock(step, repeats=3)
    tokens = sum(group.tokens for group in groups)
    attention = 14.0 * count * d.query * sum(group.pairs for group in groups)
    products = (6.0 * count * d.matrices * tokens + attention) / rate
    return min(0.9, max(0.01, 1 - products / seconds))


def _head(d: Dimensions, clock: _Clock, dtype: torch.dtype) -> float:
    tokens = _HEAD_TOKENS if d.head < 100e6 or clock.device.type == "cuda" else 64
    hidden = torch.randn(tokens, d.hidden, device=clock.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(d.vocabulary, d.hidden, device=clock.device, dtype=dtype, requires_grad=True)
    targets = torch.randint(d.vocabulary, (tokens,), device=clock.device)
    layout = GroupLayout.of([2], teacher=False, lengths=[tokens // 2, tokens - tokens // 2], device=clock.device)
    advantages = torch.tensor([1.0, -1.0], device=clock.device)

    def step() -> None:
        loss = linear_grpo_loss(
            hidden, weight, targets, layout, advantages=advantages, ref_logprob=None,
            clip_low=0.2, clip_high=0.2, kl_coef=0.0, denominator=tokens,
        ).loss  # fmt: skip
        loss.backward()
        hidden.grad = weight.grad = None

    return 6 * tokens * d.head / clock(step, repeats=3)


def _copy(clock: _Clock) -> float:
    """Bytes/s, read and written ones counted."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=clock.device)
    target = torch.zeros_like(source)
    return 2 * _COPY_BYTES / clock(lambda: target.copy_(source))


def _decode(d: Dimensions, clock: _Clock, rate: float, dtype: torch.dtype) -> dict[str, float]:
    """Bandwidth at one row, and the rate of products at several numbers of rows."""
    layers = min(d.layers, max(1, round(_DECODE_BYTES / (d.matrices * dtype.itemsize))))
    weights = _matrices(d, layers, clock.device, dtype)
    entries = sum(w.numel() for w in weights)
    product = decoding_linear() if clock.device.type == "cpu" else F.linear
    seconds = {}
    with torch.no_grad():
        for rows in DECODE_ROWS:
            inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=clock.device, dtype=dtype) for w in weights}
            seconds[rows] = clock(lambda inputs=inputs: [product(inputs[w.shape[1]], w, None) for w in weights])  # type: ignore[misc]
    if clock.device.type == "cuda":
        return {"decode_flops_share": min(1.0, 2 * DECODE_ROWS[-1] * entries / seconds[DECODE_ROWS[-1]] / rate)}
    flops = {f"decode_flops_{rows}": 2 * rows * entries / spent for rows, spent in seconds.items()}
    return {"decode_bandwidth": entries * dtype.itemsize / seconds[1], **flops}


def _files() -> tuple[float, float]:
    """(bytes/s written and synced, bytes/s read back) in the folder for temporary files."""
    block = os.urandom(1 << 20) * 16
    gc.collect()
    with tempfile.NamedTemporaryFile() as file:
        begin = time.perf_counter()
        for _ in range(_FILE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        begin = time.perf_counter()
        file.seek(0)
        while file.read(len(block)):
            pass
        return _FILE_BYTES / written, _FILE_BYTES / (time.perf_counter() - begin)
